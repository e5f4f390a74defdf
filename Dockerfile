# Serves the bundles in bundles/. The serving lock alone is installed: no torch, no build tools in the final image.
FROM python:3.11-slim AS environment
COPY requirements/serve.hashes.txt /tmp/serve.hashes.txt
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r /tmp/serve.hashes.txt
COPY . /tmp/vitrine
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps /tmp/vitrine \
    && /opt/venv/bin/pip uninstall --yes --quiet pip

FROM python:3.11-slim
RUN useradd --uid 10001 --no-create-home vitrine
COPY --from=environment /opt/venv /opt/venv
WORKDIR /app
COPY bundles bundles
# The server writes below /tmp only: a read-only container needs no other writable place.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 VITRINE_HOST=0.0.0.0
USER 10001
EXPOSE 3000 8081
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:3000/readyz', timeout=2)"]
CMD ["vitrine", "serve"]
