//! Reads a page of the HTTP server of a daemon, and the samples on it.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

/// The longest wait for a page, which is created from memory.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The body of `path`.
///
/// # Errors
///
/// When the answer is not 200.
pub(crate) fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("{path} was not answered"))?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.contains(" 200 "), "{path}: {status}");
    Ok(body.to_owned())
}

/// The sum of the samples of `metric` that have `label`.
///
/// # Errors
///
/// When one is not a whole number.
pub(crate) fn sum(page: &str, metric: &str, label: &str) -> Result<u64> {
    page.lines()
        .filter_map(|line| line.strip_prefix(metric)?.strip_prefix('{'))
        .filter_map(|sample| sample.rsplit_once("} "))
        .filter(|(labels, _)| labels.split(',').any(|held| held == label))
        .map(|(_, value)| {
            value
                .parse::<u64>()
                .with_context(|| format!("{metric} is {value:?}"))
        })
        .sum()
}

/// The one sample of `metric`, which has no labels.
///
/// # Errors
///
/// When it is missing, or is not a whole number.
pub(crate) fn value(page: &str, metric: &str) -> Result<u64> {
    page.lines()
        .find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '))
        .with_context(|| format!("{metric} is not told"))?
        .parse()
        .with_context(|| format!("{metric} is no whole number"))
}
