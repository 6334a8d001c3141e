#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| otel_conntrack::host::fuzzing::config(text));
