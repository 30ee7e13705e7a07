"""What numpy is used for: products, inverses, random numbers, mapped files."""

import numpy as np

a = np.random.default_rng(7).random((400, 400))
product = a @ np.linalg.inv(a)
print(bool(np.allclose(product, np.eye(400), atol=1e-6)))
np.save("a.npy", a)
print(float(np.load("a.npy", mmap_mode="r").sum()) == float(a.sum()))
