//! Compiles `proto/` in process: neither `protoc` nor the network is needed.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler
        .include_imports(true)
        .include_source_info(true)
        .open_files([
            "envoy/service/auth/v3/external_auth.proto",
            "relatch/admin/v1/admin.proto",
            "relatch/discovery/v1/discovery.proto",
            "relatch/snapshot/v1/snapshot.proto",
        ])?;
    // For the reflection service of the admin API.
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(
        out_dir.join("descriptors.bin"),
        compiler.encode_file_descriptor_set(),
    )?;
    tonic_prost_build::configure()
        .codec_path("crate::proto::codec::SmallBuffers")
        // What a client sent is shared with the received buffer rather than copied.
        .bytes(".")
        // A request's headers and our own secrets must not be printable by accident.
        .skip_debug([
            ".envoy.service.auth.v3",
            ".relatch.admin.v1.AddWebhookRequest",
            ".relatch.admin.v1.AddWebhookResponse",
            ".relatch.admin.v1.CreateTokenResponse",
            ".relatch.admin.v1.ExplainRequest",
            ".relatch.admin.v1.ImportKeyRequest",
            ".relatch.admin.v1.IssuedKey",
            ".relatch.admin.v1.Webhook",
            ".relatch.discovery.v1.Pepper",
            ".relatch.snapshot.v1",
        ])
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
