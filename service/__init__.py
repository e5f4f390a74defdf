"""HTTP: the BentoML service, its request and response schemas, its settings."""
