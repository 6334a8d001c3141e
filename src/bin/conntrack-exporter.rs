//! `conntrack-exporter`: the host's TCP connections for Prometheus and OTLP.

fn main() {}
