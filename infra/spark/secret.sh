#!/bin/sh
# Runs a command with the settings of SPARK_CONF_DIR and, where they ask for encryption, the secret SPARK_SECRET that the master, its
# workers and the drivers share. A standalone cluster can't make one by itself, and settings are files: an argument list is read by
# everybody on the machine.
set -eu
if grep -qs '^spark.network.crypto.enabled *true' "${SPARK_CONF_DIR:-}/spark-defaults.conf"; then
  : "${SPARK_SECRET:?set it: a long random text, the same for the master, its workers and the drivers}"
  umask 077
  folder="${TMPDIR:-/tmp}/spark-conf"
  rm -rf "$folder"
  cp -r "$SPARK_CONF_DIR" "$folder"
  printf '\nspark.authenticate true\nspark.authenticate.secret %s\n' "$SPARK_SECRET" >> "$folder/spark-defaults.conf"
  export SPARK_CONF_DIR="$folder"
fi
unset SPARK_SECRET
exec "$@"
