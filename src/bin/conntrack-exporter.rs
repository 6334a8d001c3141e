//! `conntrack-exporter`: the host's TCP connections for Prometheus and OTLP.
//!
//! All of it is in [`otel_conntrack::host::exporter`].

fn main() -> std::process::ExitCode {
    otel_conntrack::host::exporter::main()
}
