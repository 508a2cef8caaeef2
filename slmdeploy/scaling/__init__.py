"""The way past one machine: the server of serving/ as replicas on a cluster."""
