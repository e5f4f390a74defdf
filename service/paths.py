"""Paths that the middleware treats specially."""

PROBES = frozenset({"/livez", "/readyz", "/healthz"})
PROTOCOL_PROBES = frozenset({"/v2/health/live", "/v2/health/ready"})
METRICS = "/metrics"
PAGE_FILES = "/page/"  # prefix of the files of the page at `/`
STATIC_FILES = "/static_content/"  # prefix of the OpenAPI page's files, served by BentoML
