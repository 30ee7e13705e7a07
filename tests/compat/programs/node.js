const fs = require('fs/promises'), { Worker, isMainThread, parentPort } = require('worker_threads');
const { execFile } = require('child_process'), { promisify } = require('util'), zlib = require('zlib');
const crypto = require('crypto');
if (!isMainThread) { let s = 0; for (let i = 0; i < 1e6; i++) s += i % 7; parentPort.postMessage(s); }
else (async () => {
    const sums = await Promise.all([1, 2, 3].map(() => new Promise((done, fail) => {
        const worker = new Worker(__filename); worker.on('message', done); worker.on('error', fail); })));
    await fs.writeFile('n.gz', await promisify(zlib.gzip)('x'.repeat(1e5)));
    const back = await promisify(zlib.gunzip)(await fs.readFile('n.gz'));
    const { stdout } = await promisify(execFile)('/bin/echo', ['child']);
    const key = await promisify(crypto.scrypt)('a', 'b', 16);
    console.log(JSON.stringify([sums[0] === sums[2], back.length, stdout.trim(), key.length]));
})();
