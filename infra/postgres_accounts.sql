-- Accounts of an online store on PostgreSQL, none of which may do more than its work, as redis.sh makes them for Redis: `publisher`
-- (the jobs) owns the tables, `reader` (the serving process and whoever looks vectors up) reads, `srs` reads and pushes histories.
-- Once, by the database's administrator, in its database:
--   psql --dbname online --file infra/postgres_accounts.sql      then \password publisher, \password reader, \password srs
-- and again after the first publish, which makes the tables: histories are then open to `srs`.
DO $$ DECLARE name text; BEGIN
  FOREACH name IN ARRAY ARRAY['publisher', 'reader', 'srs'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN EXECUTE format('CREATE ROLE %I LOGIN', name); END IF;
  END LOOP;
  EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
  EXECUTE format('GRANT CONNECT ON DATABASE %I TO publisher, reader, srs', current_database());
END $$;
CREATE SCHEMA IF NOT EXISTS llmemb AUTHORIZATION publisher;
GRANT USAGE ON SCHEMA llmemb TO reader, srs;
GRANT SELECT ON ALL TABLES IN SCHEMA llmemb TO reader, srs;
ALTER DEFAULT PRIVILEGES FOR ROLE publisher IN SCHEMA llmemb GRANT SELECT ON TABLES TO reader, srs;
-- how `settle` asks standbys (LLMEMB_REPLICAS)
GRANT pg_read_all_stats TO publisher;
DO $$ BEGIN
  IF to_regclass('llmemb.llmemb_user_history') IS NOT NULL THEN GRANT INSERT, UPDATE ON llmemb.llmemb_user_history TO srs; END IF;
END $$;
