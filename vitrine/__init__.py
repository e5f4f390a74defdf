"""Vision transformers from training to an HTTP answer."""
