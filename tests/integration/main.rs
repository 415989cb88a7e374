//! Integration tests: the real binary, real ports, real Envoy, Traefik, Caddy and nginx, real OpenBao, real databases.
//!
//! `scripts/test.sh` fetches the proxies, the Node.js and the OpenBao that they run; `support/` holds one file for each thing
//! that a test stands up.

mod architecture;
mod canary;
mod checks;
mod docs;
mod envoy_facts;
mod faults;
mod fuzz;
mod http_authz;
mod lifecycle;
mod sbom;
mod sinks;
mod store_contract;
mod store_sqlite;
mod support;
mod webhooks;
