"""The image routes: images in, labels or boxes out, and the documents that describe them."""
