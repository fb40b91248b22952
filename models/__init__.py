"""WHAT is computed: tensors in, tensors out; no tables, no registry, no tracking client."""
