# docker build -t latent-density . && docker run latent-density            (make repro)
#                                     docker run latent-density make test
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /project
COPY . .
RUN git config --global user.name container && git config --global user.email container@localhost \
    && git config --global --add safe.directory /project && make install
CMD ["make", "repro"]
