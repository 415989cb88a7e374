//! Lines of a log on their way to a writer, without a cost to whoever logs.
//!
//! Standard error may be a pipe that nobody reads, or a slow disk. A line therefore goes into a bounded queue, which a
//! thread writes out; when the queue is full the line is dropped and counted.

use std::{
    io::{self, Write},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;

/// The entry of the queue: each write is one line. Cheap to clone; a write never waits and never fails.
#[derive(Clone, Debug)]
pub(crate) struct Lines {
    queue: SyncSender<Entry>,
    dropped: Counter,
}

/// Writes out what is queued when it is dropped.
#[derive(Debug)]
#[must_use = "dropped, it flushes once and no more"]
pub(crate) struct LinesGuard {
    lines: Lines,
}

/// The most lines that wait: some seconds of a busy log and, at about 300 bytes each, a megabyte or so.
const QUEUE: usize = 4096;

/// How long the end of the process waits for a writer that is stuck.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum Entry {
    Line(Vec<u8>),
    /// Asks for a word when everything before it is written.
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
        // A full queue is one whose writer is stuck: there is nothing to wait for.
        if self.lines.queue.try_send(Entry::Flush(sender)).is_ok() {
            let _late = flushed.recv_timeout(FLUSH_TIMEOUT);
        }
    }
}

/// Writes until nobody can log any more. A line that cannot be written has nowhere else to go.
fn write_out(entries: &Receiver<Entry>, mut writer: impl Write) {
    for entry in entries {
        match entry {
            Entry::Line(line) => {
                let _unwritten = writer.write_all(&line);
            }
            Entry::Flush(done) => {
                let _unwritten = writer.flush();
                // Whoever asked may have stopped waiting.
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
