//! Writes log lines on a thread of its own, so that logging never waits.
//!
//! Standard error may be a pipe that nobody reads, or a slow disk. A line therefore goes into a bounded queue, which a
//! thread writes out. If the queue is full, the line is dropped and counted.

use std::{
    io::{self, Write},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;

/// The sending end of the queue. Each write is one line; it never waits and never fails. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Lines {
    queue: SyncSender<Entry>,
    dropped: Counter,
}

/// Writes out the queued lines when it is dropped.
#[derive(Debug)]
#[must_use = "when it is dropped, it writes out the queue for the last time"]
pub(crate) struct LinesGuard {
    lines: Lines,
}

/// The most lines in the queue: some seconds of a busy log. At about 300 bytes each, they need about a megabyte.
const QUEUE: usize = 4096;

/// The longest time that the end of the process waits for a writer that does not respond.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum Entry {
    Line(Vec<u8>),
    /// Asks for a message when all lines before it are written.
    Flush(SyncSender<()>),
}

impl Lines {
    /// Starts a thread that writes to `writer`.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub(crate) fn to(writer: impl Write + Send + 'static) -> io::Result<(Self, LinesGuard)> {
        let (queue, entries) = sync_channel(QUEUE);
        let lines = Self {
            queue,
            dropped: Counter::default(),
        };
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_out(&entries, writer))?;
        let guard = LinesGuard {
            lines: lines.clone(),
        };
        Ok((lines, guard))
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Entry::Line(line.to_vec())).is_err() {
            self.dropped.inc();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LinesGuard {
    /// Counts the lines that were dropped.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn dropped(&self) -> Counter {
        self.lines.dropped.clone()
    }
}

impl Drop for LinesGuard {
    fn drop(&mut self) {
        let (sender, flushed) = sync_channel(1);
        // If the queue is full, its writer does not respond: waiting would not help.
        if self.lines.queue.try_send(Entry::Flush(sender)).is_ok() {
            let _late = flushed.recv_timeout(FLUSH_TIMEOUT);
        }
    }
}

/// Writes until all senders are gone. A line that cannot be written is lost.
fn write_out(entries: &Receiver<Entry>, mut writer: impl Write) {
    for entry in entries {
        match entry {
            Entry::Line(line) => {
                let _unwritten = writer.write_all(&line);
            }
            Entry::Flush(done) => {
                let _unwritten = writer.flush();
                // The receiver may have stopped waiting.
                let _gone = done.send(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Keeps what is written, and waits for a word before each line when it has somebody to wait for.
    struct Slow {
        written: Arc<Mutex<Vec<u8>>>,
        go: Option<Receiver<()>>,
    }

    impl Write for Slow {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            if let Some(go) = &self.go {
                // An error says that the test lets everything pass.
                let _passed = go.recv();
            }
            self.written
                .lock()
                .expect("no panic")
                .extend_from_slice(line);
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_is_queued_is_written_before_the_guard_is_gone() {
        let written = Arc::default();
        let (mut lines, guard) = Lines::to(Slow {
            written: Arc::clone(&written),
            go: None,
        })
        .expect("a thread");
        lines.write_all(b"one\n").expect("never fails");
        lines.write_all(b"two\n").expect("never fails");
        drop(guard);
        assert_eq!(*written.lock().expect("no panic"), b"one\ntwo\n");
    }

    #[test]
    fn a_stuck_writer_costs_lines_and_no_time() {
        let written: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (let_pass, go) = sync_channel(0);
        let (mut lines, guard) = Lines::to(Slow {
            written: Arc::clone(&written),
            go: Some(go),
        })
        .expect("a thread");
        // Were a write to wait for the writer, this would never end.
        for _ in 0..2 * QUEUE {
            lines.write_all(b".").expect("never fails");
        }
        let dropped = guard.dropped().get();
        let queued = 2 * QUEUE as u64 - dropped;
        // Beside the queue, one line may be in the writer's hands.
        assert!(
            (QUEUE as u64..=QUEUE as u64 + 1).contains(&queued),
            "{queued} lines are queued"
        );
        drop(let_pass);
        let (sender, flushed) = sync_channel(1);
        lines
            .queue
            .send(Entry::Flush(sender))
            .expect("the thread lives");
        flushed.recv().expect("the thread answers");
        assert_eq!(written.lock().expect("no panic").len() as u64, queued);
    }
}
