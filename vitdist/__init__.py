"""vitdist: hierarchical fine-grained image classification that scales from a laptop to a cluster."""
