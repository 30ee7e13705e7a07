"""Evidence: what a frozen family looked like, captured from outside, bundled, kept and handed out."""
