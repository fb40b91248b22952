#!/bin/sh
# What the image of PostgreSQL does when it starts, as far as compose.yaml uses it: at its first start it makes the cluster, closed to
# the network, and runs what lies in /docker-entrypoint-initdb.d.
set -eu
export PGDATA=/var/lib/postgresql/data
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  umask 077
  printf %s "$POSTGRES_PASSWORD" > /tmp/password
  initdb --username "$POSTGRES_USER" --pwfile /tmp/password --auth-local trust --auth-host scram-sha-256
  rm /tmp/password
  pg_ctl start --wait --options "-c listen_addresses="
  for script in /docker-entrypoint-initdb.d/*.sh; do
    sh "$script"
  done
  pg_ctl stop --wait
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
fi
exec "$@" -c "listen_addresses=*"
