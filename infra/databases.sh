#!/bin/sh
# PostgreSQL's first start: a database and an account for each of Airflow, MLflow and Feast, closed to the others.
set -eu
# the password goes through the environment: an argument list is read by everybody on the machine
create() {
  PASSWORD="$2" psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --set name="$1" <<'SQL'
\getenv password PASSWORD
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
}
create airflow "$AIRFLOW_PASSWORD"
create mlflow "$MLFLOW_PASSWORD"
create feast "$FEAST_PASSWORD"
