use std::sync::Mutex;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    task::JoinHandle,
};

use super::*;
use crate::{
    authz::{
        Authorizer, CheckEvent, CredentialSource, DenyReason, Dialect, Observer, Outcome, Settings,
        SettingsParts,
        testing::{keyrings, parts},
    },
    clock::Clock,
    key::{KeyId, Scopes, Timestamp, testing},
};

/// An observer that stores the outcome of each check.
#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<Outcome>>);

impl Observer for Recorder {
    fn observe(&self, event: &CheckEvent<'_>) {
        let outcome = event.decision.outcome();
        self.0.lock().expect("no test panics here").push(outcome);
    }
}

/// A connection of a proxy to the profile `shop`.
struct Proxy {
    stream: DuplexStream,
    /// What was read behind the last answer.
    ahead: Vec<u8>,
    key: String,
    recorder: Arc<Recorder>,
    stop: CancellationToken,
    served: JoinHandle<Result<(), ConnectionError>>,
}

/// An answer: the status line, the headers in lower case, and the body.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Proxy {
    fn connect() -> Self {
        let secret = testing::secret(KeyId::generate().expect("the random source works"));
        let keyrings = keyrings(vec![testing::record_of(&secret)], true);
        let recorder = Arc::new(Recorder::default());
        let (clock, _) = Clock::manual(Timestamp::from_millis(5_000));
        let settings = Settings::new(SettingsParts {
            dialect: Dialect::Traefik,
            credentials: CredentialSource::defaults(),
            ..parts()
        });
        let settings = Arc::new(settings.expect("valid settings"));
        let authorizer = Authorizer::new(settings, &keyrings, clock, recorder.clone());
        let keyring = testing::keyring_name();
        let profile = Profile {
            name: "shop".to_owned(),
            checks: ForwardAuth::new(authorizer, keyring, &Scopes::default()),
        };
        let (stream, far) = duplex(1 << 20);
        let stop = CancellationToken::new();
        let service = HttpAuthz::new(vec![profile], None);
        Self {
            stream,
            ahead: Vec::new(),
            key: secret.expose().to_owned(),
            recorder,
            served: tokio::spawn(serve(far, service, stop.clone())),
            stop,
        }
    }

    /// Returns the head of a request with a good key. `more` is lines of headers.
    fn head(&self, method: &str, path: &str, more: &str) -> String {
        format!(
            "{method} {path} HTTP/1.1\r\nhost: relatch\r\n\
             x-forwarded-method: POST\r\nx-forwarded-uri: /orders\r\n\
             x-forwarded-host: api.example.com\r\nx-forwarded-proto: https\r\n\
             x-forwarded-for: 192.0.2.1\r\nx-api-key: {}\r\n{more}\r\n",
            self.key
        )
    }

    async fn send(&mut self, text: &str) {
        let sent = self.stream.write_all(text.as_bytes()).await;
        sent.expect("the connection is open");
    }

    async fn ask(&mut self, path: &str) -> Answer {
        let head = self.head("GET", path, "");
        self.send(&head).await;
        self.answer().await
    }

    async fn answer(&mut self) -> Answer {
        loop {
            if let Some(answer) = self.take() {
                return answer;
            }
            let read = self.stream.read_buf(&mut self.ahead).await;
            assert!(read.expect("readable") > 0, "closed: {:?}", self.ahead);
        }
    }

    /// Takes a whole answer from what was read.
    fn take(&mut self) -> Option<Answer> {
        let text = String::from_utf8(self.ahead.clone()).expect("text");
        let (head, rest) = text.split_once("\r\n\r\n")?;
        let head = head.to_ascii_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map_or(0, |length| length.parse().expect("a number"));
        let body = rest.get(..length)?.to_owned();
        self.ahead = rest.as_bytes()[length..].to_vec();
        let status = head.split(' ').nth(1).expect("a status");
        Some(Answer {
            status: status.parse().expect("a number"),
            head,
            body,
        })
    }

    /// Waits until the connection is closed, and nothing more was sent.
    async fn closed(mut self) -> Result<(), ConnectionError> {
        let mut rest = Vec::new();
        let read = self.stream.read_to_end(&mut rest).await;
        read.expect("closed in order");
        assert_eq!(String::from_utf8_lossy(&rest), "");
        self.served.await.expect("the connection does not panic")
    }

    fn outcomes(&self) -> Vec<Outcome> {
        self.recorder.0.lock().expect("no test panics here").clone()
    }
}

#[tokio::test]
async fn a_connection_answers_one_check_after_the_other() {
    let mut proxy = Proxy::connect();
    for _ in 0..3 {
        let answer = proxy.ask("/authz/shop").await;
        assert_eq!(answer.status, 200);
        let consumer = "\r\nx-relatch-consumer: checkout";
        assert!(answer.head.contains(consumer), "{}", answer.head);
        assert!(!answer.head.contains("connection: close"));
        assert_eq!(answer.body, "");
    }
    assert_eq!(proxy.outcomes(), [Outcome::Allowed; 3]);
}

#[tokio::test]
async fn only_the_path_of_a_profile_is_served_and_its_query_says_nothing() {
    let mut proxy = Proxy::connect();
    for path in [
        "/",
        "/authz",
        "/authz/",
        "/authz/other",
        "/authz/shop/",
        "/authz/SHOP",
        "/authz/sho%70",
        "//authz/shop",
        "/metrics",
    ] {
        assert_eq!(proxy.ask(path).await.status, 404, "{path}");
    }
    assert_eq!(proxy.outcomes(), []);
    let answer = proxy.ask("/authz/shop?keyring=empty&auth=optional").await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn every_method_is_answered_and_a_small_body_is_skipped() {
    let mut proxy = Proxy::connect();
    for method in ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"] {
        let head = proxy.head(method, "/authz/shop", "content-length: 5\r\n");
        proxy.send(&format!("{head}12345")).await;
        let answer = proxy.answer().await;
        assert_eq!(answer.status, 200, "{method}");
        assert!(!answer.head.contains("connection: close"), "{method}");
    }
    let head = proxy.head("POST", "/authz/shop", "transfer-encoding: chunked\r\n");
    proxy.send(&format!("{head}3\r\nabc\r\n0\r\n\r\n")).await;
    assert_eq!(proxy.answer().await.status, 200);
    assert_eq!(proxy.ask("/authz/shop").await.status, 200);
}

#[tokio::test]
async fn a_large_body_is_not_read_and_ends_the_connection_after_the_answer() {
    let mut proxy = Proxy::connect();
    let more = format!("content-length: {}\r\n", 10 << 20);
    let head = proxy.head("POST", "/authz/shop", &more);
    proxy.send(&head).await;
    proxy.send(&"x".repeat(MAX_BODY + 1)).await;
    let answer = proxy.answer().await;
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("connection: close"), "{}", answer.head);
    assert!(proxy.closed().await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_arrive_ends_the_connection_after_the_answer() {
    let mut proxy = Proxy::connect();
    let head = proxy.head("POST", "/authz/shop", "content-length: 5\r\n");
    proxy.send(&head).await;
    let answer = proxy.answer().await;
    assert!(answer.head.contains("connection: close"), "{}", answer.head);
}

#[tokio::test]
async fn a_head_that_is_too_large_is_denied_and_counted() {
    for more in [
        format!("x-filler: {}\r\n", "x".repeat(3 * MAX_HEAD)),
        "x-filler: 1\r\n".repeat(120),
    ] {
        let mut proxy = Proxy::connect();
        let head = proxy.head("GET", "/authz/shop", &more);
        proxy.send(&head).await;
        assert_eq!(proxy.answer().await.status, 431);
        let recorder = Arc::clone(&proxy.recorder);
        assert!(proxy.closed().await.is_err());
        let too_large = Outcome::Denied(DenyReason::RequestTooLarge);
        assert_eq!(
            *recorder.0.lock().expect("no test panics here"),
            [too_large]
        );
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_at_last() {
    let mut proxy = Proxy::connect();
    assert_eq!(proxy.ask("/authz/shop").await.status, 200);
    let began = tokio::time::Instant::now();
    let _idle = proxy.closed().await;
    let elapsed = began.elapsed();
    assert!(
        (IDLE_TIMEOUT..=IDLE_TIMEOUT * 2 + GRACE).contains(&elapsed),
        "{elapsed:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_stop_closes_idle_connections() {
    for is_used in [true, false] {
        let mut proxy = Proxy::connect();
        if is_used {
            assert_eq!(proxy.ask("/authz/shop").await.status, 200);
        }
        let began = tokio::time::Instant::now();
        proxy.stop.cancel();
        assert!(proxy.closed().await.is_ok());
        assert!(began.elapsed() < LAST_REQUEST * 2, "{:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_crosses_a_stop_is_answered_and_is_the_last() {
    let mut proxy = Proxy::connect();
    assert_eq!(proxy.ask("/authz/shop").await.status, 200);
    proxy.stop.cancel();
    // The clock of the test is paused: the request begins exactly in the middle of the last moment.
    tokio::time::sleep(LAST_REQUEST / 2).await;
    let answer = proxy.ask("/authz/shop").await;
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("connection: close"), "{}", answer.head);
    assert!(proxy.closed().await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn half_a_request_does_not_hold_a_stop_up() {
    let mut proxy = Proxy::connect();
    proxy.send("GET /authz/shop HTTP/1.1\r\nx-forw").await;
    tokio::task::yield_now().await;
    let began = tokio::time::Instant::now();
    proxy.stop.cancel();
    let mut rest = Vec::new();
    let read = proxy.stream.read_to_end(&mut rest).await;
    read.expect("closed");
    assert!(began.elapsed() <= LAST_REQUEST + GRACE);
}
