//! The orderly end of a sidecar: what is under way is answered, nothing else is taken, and the fleet knows at once.

use std::{future::poll_fn, net::SocketAddr, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use envoy_types::pb::envoy::service::auth::v3::CheckResponse;
use h2::client::{ResponseFuture, SendRequest};
use http::Request;
use prost::Message;
use rustix::process::Signal;
use tokio::net::TcpStream;
use tonic::transport::Channel;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    deployment::{Control, KEYRING, Sidecar, Verdict, check_request},
    snapshot::Disk,
};
use crate::support::{
    envoy::{AuthzAddress, Envoy, EnvoyOptions},
    eventually::{DEADLINE, eventually, within},
    load::Load,
    relatch::sidecar_yaml,
    upstream::Upstream,
};

/// A Check of which the sidecar has a part.
struct HalfSent {
    rest: Bytes,
    stream: h2::SendStream<Bytes>,
    answer: ResponseFuture,
}

/// Checks under way at once: fewer than the streams of a connection, more than one read brings.
const UNDER_WAY: usize = 50;

#[tokio::test]
async fn a_sidecar_that_is_told_to_stop_leaves_the_fleet_at_once() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let mut stopping = Sidecar::start(&control, "edge-1").await;
    let _staying = Sidecar::start(&control, "edge-2").await;
    assert_eq!(control.fleet().await, ["edge-1", "edge-2"]);

    // A daemon that has to cut something off does not end with 0.
    let status = stopping.daemon.stop().await;

    assert_eq!(status.code(), Some(0));
    eventually("the sidecar is gone from the fleet", async || {
        (control.fleet().await == ["edge-2"]).then_some(())
    })
    .await;
    // Nobody waits for it, although it could have served for an hour.
    let rotate = ["rotate", "start", &key.id, "--timeout", "30s"];
    assert_eq!(control.json(&rotate).await["total"], 1);
}

#[tokio::test]
async fn checks_under_way_are_answered_while_a_sidecar_stops() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let mut sidecar = Sidecar::start(&control, "edge-1").await;
    let AuthzAddress::Tcp(address) = sidecar.daemon.ext_authz() else {
        panic!("it listens on TCP");
    };
    let stream = TcpStream::connect(address).await.expect("it listens");
    let (mut client, connection) = h2::client::handshake(stream).await.expect("it is HTTP/2");
    let connection = tokio::spawn(connection);
    let mut under_way = Vec::new();
    for _ in 0..UNDER_WAY {
        client = client.ready().await.expect("the connection is open");
        under_way.push(HalfSent::send(&mut client, &key.secret));
    }
    // An answer on the same connection: what was sent before it has arrived.
    client = client.ready().await.expect("the connection is open");
    let whole = HalfSent::send(&mut client, &key.secret);
    assert_eq!(whole.finish().await, Verdict::allowed(1));

    sidecar.daemon.process.signal(Signal::TERM);
    sidecar.daemon.process.wait_for_line("shutting down").await;
    within(DEADLINE, "the connection takes no more checks", async {
        while poll_fn(|context| client.poll_ready(context)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    eventually("the pages are gone", async || {
        let page = TcpStream::connect(sidecar.daemon.http()).await;
        page.is_err().then_some(())
    })
    .await;
    for check in under_way {
        assert_eq!(check.finish().await, Verdict::allowed(1));
    }

    let status = sidecar.daemon.process.exit().await;
    assert_eq!(status.code(), Some(0));
    connection.abort();
}

/// A check that is under way keeps the stream to the control plane open, and what comes by it is applied.
#[tokio::test]
async fn what_comes_while_a_sidecar_stops_is_on_its_disk() {
    let disk = Disk::new().await;
    let control = Control::start().await;
    let key = control.create_key().await;
    let mut sidecar = disk.start(&control).await;
    sidecar.ready().await;
    let AuthzAddress::Tcp(address) = sidecar.daemon.ext_authz() else {
        panic!("it listens on TCP");
    };
    let stream = TcpStream::connect(address).await.expect("it listens");
    let (mut client, connection) = h2::client::handshake(stream).await.expect("it is HTTP/2");
    let connection = tokio::spawn(connection);
    let under_way = HalfSent::send(&mut client, &key.secret);
    client = client.ready().await.expect("the connection is open");
    let whole = HalfSent::send(&mut client, &key.secret);
    assert_eq!(whole.finish().await, Verdict::allowed(1));

    sidecar.daemon.process.signal(Signal::TERM);
    sidecar.daemon.process.wait_for_line("shutting down").await;
    let last = control.create_key().await;
    eventually("the sidecar has applied it", async || {
        let fleet = control.json(&["fleet"]).await;
        let applied = fleet[0]["keyrings"][0]["applied_revision"].as_u64()?;
        (applied >= last.revision).then_some(())
    })
    .await;
    drop(under_way);
    connection.abort();

    assert_eq!(sidecar.daemon.process.exit().await.code(), Some(0));
    assert_eq!(disk.keyring().await["revision"], last.revision);
}

/// Between the end of one sidecar and the start of the next Envoy fails closed; nothing else may go wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_is_replaced_under_load_without_a_wrong_answer() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let files = tempfile::tempdir().expect("a directory can be made");
    let socket = files.path().join("authz.sock");
    let listen = format!("unix://{}", socket.display());
    let yaml = sidecar_yaml("edge-1", control.plane.discovery(), &[KEYRING]).replacen(
        "listen: 127.0.0.1:0",
        &format!("listen: {listen}"),
        1,
    );
    let mut sidecar = Sidecar::with_config(&yaml).await;
    sidecar.ready().await;
    let upstream = Upstream::start().await;
    let envoy = Envoy::start(EnvoyOptions::new(socket.clone(), upstream.addr())).await;
    let secret = key.secret.clone();
    let request = move || crate::support::client::Request::get("/").header("x-api-key", &secret);
    let load = Load::start(envoy.addr(), request, 4);
    load.answered(200).await;

    let status = sidecar.daemon.stop().await;

    assert_eq!(status.code(), Some(0));
    assert!(!socket.exists(), "the socket's file is left behind");
    load.answered(20).await;
    let sidecar = Sidecar::with_config(&yaml).await;
    sidecar.ready().await;
    eventually("requests are let through again", async || {
        let before = upstream.requests();
        load.answered(50).await;
        (upstream.requests() >= before + 40).then_some(())
    })
    .await;
    let totals = load.stop().await;
    // While nobody answered, Envoy failed closed with its own status: no request was let through or called wrong.
    for sample in &totals.samples {
        assert!(sample.starts_with("503"), "{sample}");
    }
    assert!(totals.ok >= 200);
}

#[tokio::test]
async fn whoever_watches_the_health_of_a_sidecar_is_told_and_does_not_hold_it_up() {
    let control = Control::start().await;
    control.create_key().await;
    let mut sidecar = Sidecar::start(&control, "edge-1").await;
    let AuthzAddress::Tcp(address) = sidecar.daemon.ext_authz() else {
        panic!("it listens on TCP");
    };
    let mut health = HealthClient::new(channel(address).await);
    let request = HealthCheckRequest {
        service: "envoy.service.auth.v3.Authorization".to_owned(),
    };
    let watched = health.watch(request).await.expect("it can be watched");
    let mut watched = watched.into_inner();
    within(DEADLINE, "the sidecar serves", async {
        while next(&mut watched).await != Some(ServingStatus::Serving) {}
    })
    .await;

    sidecar.daemon.process.signal(Signal::TERM);
    let told = within(DEADLINE, "it is told", next(&mut watched)).await;
    let status = sidecar.daemon.process.exit().await;

    assert_eq!(told, Some(ServingStatus::NotServing));
    assert_eq!(status.code(), Some(0));
}

#[tokio::test]
async fn a_control_plane_that_is_told_to_stop_hands_nothing_over_and_ends_in_order() {
    let mut control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let frozen = Sidecar::start(&control, "edge-2").await;
    frozen.daemon.process.signal(Signal::STOP);
    let rotate = ["rotate", "start", &key.id];
    let mut rotation = control.plane.cli_started(&rotate);
    rotation.wait_for_line(r#""event":"barrier""#).await;
    let mut health = HealthClient::new(channel(control.plane.admin()).await);
    let watched = health.watch(HealthCheckRequest::default()).await;
    let _watched = watched.expect("it can be watched");

    control.plane.process.signal(Signal::TERM);
    let status = control.plane.process.exit().await;

    assert_eq!(status.code(), Some(0));
    assert_eq!(rotation.exit().await.code(), Some(7));
    let said = rotation.lines().join("\n");
    assert!(said.contains("version 2 was not handed out"), "{said}");
    assert!(!said.contains("\"secret\""), "{said}");
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    control.plane.restart().await;
    let shown = control.show_key(&key.id).await;
    assert_eq!(shown["versions"][1]["state"], "revoked");
    frozen.daemon.process.signal(Signal::CONT);
    assert_eq!(control.json(&rotate).await["version"], 3);
}

impl HalfSent {
    /// Sends a Check of `key` but for its last byte.
    fn send(client: &mut SendRequest<Bytes>, key: &str) -> Self {
        let request = Request::post("http://authz/envoy.service.auth.v3.Authorization/Check")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .expect("a valid request");
        let (answer, mut stream) = client.send_request(request, false).expect("it takes one");
        let mut frame = framed(&check_request(key).encode_to_vec());
        let rest = frame.split_off(frame.len() - 1);
        stream.send_data(frame, false).expect("the stream is open");
        Self {
            rest,
            stream,
            answer,
        }
    }

    /// Sends the last byte and reads the answer.
    async fn finish(mut self) -> Verdict {
        let exchange = async {
            self.stream.send_data(self.rest, true)?;
            let mut body = self.answer.await?.into_body();
            let mut bytes = BytesMut::new();
            while let Some(data) = body.data().await {
                let data = data?;
                body.flow_control().release_capacity(data.len())?;
                bytes.put(data);
            }
            Ok::<_, h2::Error>(bytes)
        };
        let bytes = within(DEADLINE, "an answer", exchange).await;
        let bytes = bytes.expect("the stream is not reset");
        let message = bytes.get(5..).expect("a frame of gRPC");
        Verdict::from(CheckResponse::decode(message).expect("an answer"))
    }
}

async fn channel(address: SocketAddr) -> Channel {
    let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address");
    endpoint.connect().await.expect("it listens")
}

/// `message` as gRPC sends it: not compressed, with its length before it.
fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).expect("a short message"));
    frame.put_slice(message);
    frame.freeze()
}

async fn next(
    watched: &mut tonic::Streaming<tonic_health::pb::HealthCheckResponse>,
) -> Option<ServingStatus> {
    let response = watched.message().await.ok()??;
    Some(response.status())
}
