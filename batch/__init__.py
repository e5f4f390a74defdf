"""Jobs over many images with one bundle, without a server."""
