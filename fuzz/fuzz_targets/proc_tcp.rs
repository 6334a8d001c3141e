#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| otel_conntrack::host::fuzzing::proc_tcp(bytes));
