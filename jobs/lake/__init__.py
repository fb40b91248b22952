"""The lake: tables, partitions, artifacts, manifests and locks. The only room that touches files."""
