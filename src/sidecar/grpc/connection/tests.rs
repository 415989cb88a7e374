//! Whole connections, from the client's side.

use std::sync::atomic::Ordering;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    time::Instant,
};

use super::*;
use crate::sidecar::testing::{Answered, Echo, LATER, Opened, Peer, check_request, framed, within};

/// The first bytes of an HTTP/2 client, with SETTINGS that change nothing.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn services() -> Services<Echo> {
    Services::new(Arc::default(), Routes::default())
}

async fn answers(calls: impl IntoIterator<Item = Opened>) -> Vec<Answered> {
    let mut answers = Vec::new();
    for call in calls {
        answers.push(call.answered().await);
    }
    answers
}

/// Opens `count` checks with one message before the connection is polled, so that one read receives
/// all.
async fn batch(peer: &mut Peer, count: usize, message: &[u8]) -> Vec<Opened> {
    let mut calls = Vec::new();
    for _ in 0..count {
        calls.push(peer.check([framed(message)]).await);
    }
    calls
}

#[tokio::test]
async fn what_one_read_brings_is_answered_in_one_write() {
    let (mut peer, writes) = Peer::counted().await;
    peer.answer(b"the first comes with settings").await;
    writes.store(0, Ordering::Relaxed);

    let calls = batch(&mut peer, 50, b"a check").await;
    for answer in answers(calls).await {
        assert_eq!(answer, Answered::to(b"a check"));
    }

    assert_eq!(writes.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn answers_that_fill_several_writes_cost_no_more_than_those() {
    let (mut peer, writes) = Peer::counted().await;
    peer.answer(b"the first comes with settings").await;
    writes.store(0, Ordering::Relaxed);

    let message = [b'a'; 3_000];
    let calls = batch(&mut peer, 50, &message).await;
    for answer in answers(calls).await {
        assert_eq!(answer, Answered::to(&message));
    }

    // The answers are 150 kB, and HTTP/2 writes nearly 16 KiB at once.
    let writes = writes.load(Ordering::Relaxed);
    assert!(writes <= 11, "{writes} writes");
}

#[tokio::test]
async fn more_than_a_batch_is_answered() {
    let (mut peer, _) = Peer::counted().await;
    let calls = batch(&mut peer, 5 * MAX_BATCH + 1, b"a check").await;
    for answer in answers(calls).await {
        assert_eq!(answer, Answered::to(b"a check"));
    }
}

/// The client sends as an Envoy whose checks waited for the connection.
#[tokio::test]
async fn what_a_client_sends_before_it_knows_how_much_it_may_is_answered() {
    let (near, far) = duplex(1 << 20);
    let stop = CancellationToken::new();
    let served = tokio::spawn(serve(far, services(), 20, stop));
    let handshake = h2::client::Builder::new()
        .initial_max_send_streams(MAX_STREAMS as usize)
        .data_frame_budget(SMALL_FRAMES)
        .handshake(near);
    let (mut client, mut driver) = handshake.await.expect("HTTP/2");
    let mut answers = Vec::new();
    for _ in 0..MAX_STREAMS {
        let opened = client.send_request(check_request(), false);
        let (answer, mut body) = opened.expect("the client knows of no limit");
        body.send_data(framed(b"a check"), true)
            .expect("the stream is open");
        answers.push(answer);
    }
    assert_eq!(client.current_max_send_streams(), MAX_STREAMS as usize);
    // The client reads and writes from now on.
    let answered = async {
        for answer in answers {
            let answer = answer.await.expect("no stream is refused");
            assert_eq!(answer.status(), http::StatusCode::OK);
        }
    };
    tokio::select! {
        () = answered => {}
        end = &mut driver => panic!("the connection has ended: {end:?}"),
    }
    assert_eq!(client.current_max_send_streams(), 20);
    drop((client, driver));
    served.await.expect("no panic").expect("an orderly end");
}

/// Calls with a whole message are answered meanwhile.
#[tokio::test]
async fn calls_that_wait_beyond_the_places_for_them_are_reset() {
    let (near, far) = duplex(1 << 20);
    let services = Services {
        places: Arc::new(Semaphore::new(2)),
        ..services()
    };
    let served = tokio::spawn(serve(far, services, 20, CancellationToken::new()));
    let (mut client, driver) = h2::client::handshake(near).await.expect("HTTP/2");
    let driver = tokio::spawn(driver);
    let message = framed(b"a check");
    let mut halves = Vec::new();
    for _ in 0..3 {
        let opened = client.send_request(check_request(), false);
        let (answer, mut body) = opened.expect("there is room");
        let sent = body.send_data(message.slice(..7), false);
        sent.expect("the stream is open");
        halves.push((answer, body));
    }
    let (refused, _body) = halves.pop().expect("there are three");
    let reset = within("a reset", refused).await;
    assert!(reset.is_err_and(|error| error.is_reset()));
    let opened = client.send_request(check_request(), false);
    let (answer, mut body) = opened.expect("there is room");
    body.send_data(message.clone(), true).expect("it is open");
    let answer = within("an answer", answer).await;
    assert_eq!(answer.expect("an answer").status(), http::StatusCode::OK);
    for (answer, mut body) in halves {
        body.send_data(message.slice(7..), true)
            .expect("it is open");
        let answer = within("an answer", answer).await;
        assert_eq!(answer.expect("an answer").status(), http::StatusCode::OK);
    }
    driver.abort();
    served.abort();
}

#[tokio::test]
async fn windows_open_again_as_checks_are_read() {
    let mut peer = Peer::connect(Routes::default()).await;
    let message = vec![b'a'; 100_000];
    for _ in 0..=3 * CONNECTION_WINDOW as usize / message.len() {
        // The message arrives in one frame, and then in several.
        assert_eq!(peer.answer(&message).await, Answered::to(&message));
        let frames = framed(&message);
        let frames = frames.chunks(9_999).map(Bytes::copy_from_slice);
        let call = peer.check(frames).await;
        assert_eq!(call.answered().await, Answered::to(&message));
    }
}

#[tokio::test]
async fn an_answer_that_comes_later_holds_no_other_up() {
    let mut peer = Peer::connect(Routes::default()).await;
    let later = peer.check([framed(LATER)]).await;
    assert_eq!(peer.answer(b"now").await, Answered::to(b"now"));
    peer.handler.release.cancel();
    assert_eq!(later.answered().await, Answered::to(LATER));
}

#[tokio::test]
async fn a_check_that_is_taken_back_is_forgotten() {
    let mut peer = Peer::connect(Routes::default()).await;
    let mut half = peer.open(check_request(), false).await;
    half.send(framed(b"a whole message").slice(..7));
    let mut later = peer.check([framed(LATER)]).await;
    peer.answer(b"they have arrived").await;
    assert_eq!(peer.handler.promised.load(Ordering::Relaxed), 1);

    half.body.send_reset(h2::Reason::CANCEL);
    later.body.send_reset(h2::Reason::CANCEL);

    within("end of the wait", peer.handler.dropped.notified()).await;
    assert_eq!(peer.answer(b"another").await, Answered::to(b"another"));
    // The last stream has ended, so that a stop does not wait.
    peer.stop.cancel();
    let served = within("end", &mut peer.served).await;
    served.expect("no panic").expect("an orderly end");
}

#[tokio::test]
async fn an_envoy_that_cancels_all_checks_again_and_again_is_served() {
    let mut peer = Peer::connect(Routes::default()).await;
    for _ in 0..12 {
        let mut calls = Vec::new();
        for _ in 0..MAX_STREAMS {
            calls.push(peer.check([framed(LATER)]).await);
        }
        for call in &mut calls {
            call.body.send_reset(h2::Reason::CANCEL);
        }
        assert_eq!(peer.answer(b"one").await, Answered::to(b"one"));
    }
}

#[tokio::test]
async fn whatever_is_under_way_at_a_stop_is_answered_and_nothing_else_is_taken() {
    let mut peer = Peer::connect(Routes::default()).await;
    let mut halves = Vec::new();
    for _ in 0..20 {
        let mut half = peer.open(check_request(), false).await;
        half.send(framed(b"a whole message").slice(..7));
        halves.push(half);
    }
    let laters = batch(&mut peer, 20, LATER).await;
    peer.answer(b"they have arrived").await;

    peer.stop.cancel();
    within("GOAWAY", async {
        while peer.is_open().await {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(!peer.served.is_finished());
    for mut half in halves {
        half.send(framed(b"a whole message").slice(7..));
        half.end();
        assert_eq!(half.answered().await, Answered::to(b"a whole message"));
    }
    peer.handler.release.cancel();
    for answer in answers(laters).await {
        assert_eq!(answer, Answered::to(LATER));
    }
    let served = within("end", &mut peer.served).await;
    served.expect("no panic").expect("an orderly end");
}

#[tokio::test]
async fn checks_that_race_with_a_stop_are_answered() {
    let mut peer = Peer::connect(Routes::default()).await;
    peer.answer(b"it is connected").await;
    peer.stop.cancel();
    // The client does not know of the stop yet.
    let calls = batch(&mut peer, 20, b"a check").await;
    for answer in answers(calls).await {
        assert_eq!(answer, Answered::to(b"a check"));
    }
    let served = within("end", &mut peer.served).await;
    served.expect("no panic").expect("an orderly end");
}

#[tokio::test]
async fn a_client_that_goes_ends_its_connection() {
    let mut peer = Peer::connect(Routes::default()).await;
    let later = peer.check([framed(LATER)]).await;
    peer.answer(b"it has arrived").await;
    let (handler, served) = (Arc::clone(&peer.handler), peer.hang_up());
    drop(later);
    within("end of the wait", handler.dropped.notified()).await;
    let _end = within("end", served).await.expect("no panic");
}

#[tokio::test]
async fn what_is_not_http_2_is_an_error() {
    let (mut client, server) = duplex(1 << 10);
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: relatch\r\n\r\n")
        .await
        .expect("it is open");
    let end = serve(server, services(), MAX_STREAMS, CancellationToken::new()).await;
    assert!(matches!(end, Err(ConnectionError::Http2(_))), "{end:?}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_is_left_after_the_handshakes_time() {
    let (_client, server) = duplex(1 << 10);
    let began = Instant::now();
    let end = serve(server, services(), MAX_STREAMS, CancellationToken::new()).await;
    assert!(matches!(end, Err(ConnectionError::Silent)), "{end:?}");
    assert_eq!(began.elapsed(), HANDSHAKE_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_does_not_hold_a_stop_up() {
    let (_client, server) = duplex(1 << 10);
    let stop = CancellationToken::new();
    stop.cancel();
    let began = Instant::now();
    let end = serve(server, services(), MAX_STREAMS, stop).await;
    assert!(matches!(end, Err(ConnectionError::Silent)), "{end:?}");
    assert_eq!(began.elapsed(), HANDSHAKE_GRACE);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_begins_late_within_a_stop_is_told_of_it() {
    let (near, far) = duplex(1 << 20);
    let stop = CancellationToken::new();
    stop.cancel();
    let served = tokio::spawn(serve(far, services(), MAX_STREAMS, stop));
    // The clock is paused: this sleep advances it immediately.
    tokio::time::sleep(HANDSHAKE_GRACE / 2).await;
    let (_client, driver) = h2::client::handshake(near).await.expect("HTTP/2");
    driver.await.expect("an orderly end");
    served.await.expect("no panic").expect("an orderly end");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_answers_pings_stays_connected() {
    let mut peer = Peer::connect(Routes::default()).await;
    let began = Instant::now();
    while began.elapsed() < 10 * keepalive::INTERVAL {
        // The clock is paused, and advances in steps that leave time for a ping and its answer.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(!peer.served.is_finished());
    assert_eq!(
        peer.answer(b"still here").await,
        Answered::to(b"still here")
    );
}

/// Returns a client that has started HTTP/2 and reads nothing from then on, and the server's end.
async fn frozen(room: usize) -> (DuplexStream, DuplexStream) {
    let (mut client, server) = duplex(room);
    client.write_all(PREFACE).await.expect("it is open");
    (client, server)
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_answer_a_ping_is_left_within_a_minute() {
    let (_client, server) = frozen(1 << 10).await;
    let began = Instant::now();
    let end = serve(server, services(), MAX_STREAMS, CancellationToken::new()).await;
    assert!(matches!(end, Err(ConnectionError::Dead)), "{end:?}");
    assert_eq!(began.elapsed(), keepalive::INTERVAL + keepalive::TIMEOUT);
    assert!(began.elapsed() < Duration::from_mins(1));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_is_left_within_a_minute() {
    // The buffer has room for the SETTINGS and little more: even a ping does not fit.
    let (_client, server) = frozen(PREFACE.len()).await;
    let began = Instant::now();
    let end = serve(server, services(), MAX_STREAMS, CancellationToken::new()).await;
    assert!(end.is_err());
    assert!(began.elapsed() < Duration::from_mins(1));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_finishes_its_headers_is_left_within_a_minute() {
    let (mut client, server) = frozen(1 << 10).await;
    // HEADERS without END_HEADERS: only CONTINUATION may follow, so that the answer to a ping is
    // not allowed.
    let half = b"\0\0\x02\x01\0\0\0\0\x01\x83\x86";
    client.write_all(half).await.expect("it is open");
    let began = Instant::now();
    let end = serve(server, services(), MAX_STREAMS, CancellationToken::new()).await;
    assert!(matches!(end, Err(ConnectionError::Dead)), "{end:?}");
    assert!(began.elapsed() < Duration::from_mins(1));
}

#[tokio::test]
async fn limits_are_told_to_the_client() {
    let (mut client, server) = frozen(1 << 10).await;
    let task = tokio::spawn(serve(server, services(), 77, CancellationToken::new()));
    let mut head = [0; 9];
    client.read_exact(&mut head).await.expect("settings");
    assert_eq!(head[3], 4, "SETTINGS");
    let mut settings = vec![0; usize::from(head[2])];
    client.read_exact(&mut settings).await.expect("settings");
    let told: Vec<(u16, u32)> = settings
        .chunks_exact(6)
        .map(|setting| {
            let (id, value) = setting.split_at(2);
            (
                u16::from_be_bytes(id.try_into().expect("two bytes")),
                u32::from_be_bytes(value.try_into().expect("four bytes")),
            )
        })
        .collect();
    for setting in [
        (3, 77),
        (4, STREAM_WINDOW),
        (5, MAX_FRAME),
        (6, MAX_HEADERS),
    ] {
        assert!(told.contains(&setting), "{setting:?} is not in {told:?}");
    }
    task.abort();
}
