#![no_main]

#[path = "../properties/input.rs"]
mod input;

#[path = "../properties/discovery_up.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| property::holds(bytes));
