"""The inference service: HTTP and gRPC routes, settings, scheduling and observability."""
