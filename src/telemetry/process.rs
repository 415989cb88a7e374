//! The standard metrics of a process in Prometheus, read from `/proc` at a scrape.

use std::{fmt, fs, io};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

/// Reads the resource use of this process at each scrape. It writes nothing if `/proc` cannot be read. The names have no
/// prefix of relatch, so the registry must not add one.
#[derive(Debug)]
pub(crate) struct ProcessCollector {
    /// Seconds from 1970 to the start of the process.
    start: f64,
}

/// The fields of `/proc/self/stat` that are used (`proc_pid_stat(5)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    /// CPU time in user space and in the kernel, in ticks (fields 14 and 15).
    cpu: u64,
    /// Ticks from the boot of the machine to the start of the process (field 22).
    start: u64,
    /// Resident pages (field 24).
    resident: u64,
}

impl ProcessCollector {
    /// A collector for this process.
    ///
    /// # Errors
    ///
    /// When `/proc` cannot be read.
    pub(crate) fn new() -> io::Result<Self> {
        let boot = boot_time(&fs::read_to_string("/proc/stat")?)
            .ok_or_else(|| io::Error::other("/proc/stat has no boot time"))?;
        Ok(Self {
            start: boot + seconds(Stat::read()?.start),
        })
    }
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if let Ok(stat) = Stat::read() {
            write(
                &mut encoder,
                "process_cpu",
                "CPU time of the process in user space and in the kernel, in seconds",
                Some(&Unit::Seconds),
                &ConstCounter::new(seconds(stat.cpu)),
            )?;
            let page = u64::try_from(rustix::param::page_size()).unwrap_or(u64::MAX);
            write(
                &mut encoder,
                "process_resident_memory",
                "Resident memory of the process, in bytes",
                Some(&Unit::Bytes),
                &gauge(stat.resident.saturating_mul(page)),
            )?;
        }
        if let Ok(open) = open_files() {
            write(
                &mut encoder,
                "process_open_fds",
                "Number of open file descriptors",
                None,
                &gauge(open),
            )?;
        }
        write(
            &mut encoder,
            "process_start_time",
            "Start time of the process, in seconds since the Unix epoch",
            Some(&Unit::Seconds),
            &ConstGauge::new(self.start),
        )
    }
}

impl Stat {
    fn read() -> io::Result<Self> {
        Self::parse(&fs::read_to_string("/proc/self/stat")?)
            .ok_or_else(|| io::Error::other("/proc/self/stat is not as documented"))
    }

    fn parse(text: &str) -> Option<Self> {
        // Field 2 is the name of the program in parentheses, which may contain any character, even parentheses. Field 3
        // follows the last `)`.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu: field(14)?.checked_add(field(15)?)?,
            start: field(22)?,
            resident: field(24)?,
        })
    }
}

fn write(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    metric: &impl EncodeMetric,
) -> Result<(), fmt::Error> {
    metric.encode(encoder.encode_descriptor(name, help, unit, metric.metric_type())?)
}

fn gauge(value: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}

#[expect(
    clippy::cast_precision_loss,
    reason = "ticks of a hundredth of a second stay exact for millions of years"
)]
fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// The line `btime` of `/proc/stat`: seconds from 1970 to the boot of the machine.
fn boot_time(stat: &str) -> Option<f64> {
    stat.lines()
        .find_map(|line| line.strip_prefix("btime "))?
        .trim()
        .parse()
        .ok()
}

fn open_files() -> io::Result<u64> {
    let listed = fs::read_dir("/proc/self/fd")?.count() as u64;
    // One of them is the descriptor of the directory that is read here.
    Ok(listed.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use prometheus_client::{encoding::text, registry::Registry};

    use super::*;
    use crate::clock::Clock;

    fn scrape() -> String {
        let mut registry = Registry::default();
        let collector = ProcessCollector::new().expect("/proc is mounted");
        registry.register_collector(Box::new(collector));
        let mut page = String::new();
        text::encode(&mut page, &registry).expect("it can be written");
        page
    }

    fn value(page: &str, name: &str) -> f64 {
        page.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
            .unwrap_or_else(|| panic!("no {name} in {page}"))
            .parse()
            .expect("a number")
    }

    #[test]
    fn a_program_may_be_named_anything() {
        let stat =
            "7 (a) b (c) S 1 1 1 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 4 0 9000 1000000 321 1844";
        assert_eq!(
            Stat::parse(stat),
            Some(Stat {
                cpu: 300,
                start: 9000,
                resident: 321,
            })
        );
        assert_eq!(Stat::parse("7 (cut) S 1"), None);
    }

    #[test]
    fn the_names_are_those_that_dashboards_know() {
        let page = scrape();
        assert!(value(&page, "process_cpu_seconds_total") >= 0.0);
        assert!(value(&page, "process_resident_memory_bytes") > 1_000_000.0);
        let start = value(&page, "process_start_time_seconds");
        let now = Clock::system().wall().as_millis() / 1000;
        let now = f64::from(u32::try_from(now).expect("a time before 2106"));
        assert!(
            (-60.0..86_400.0).contains(&(now - start)),
            "{start} at {now}"
        );
    }

    #[test]
    fn open_files_are_counted() {
        let files: Vec<_> = (0..50)
            .map(|_| fs::File::open("/proc/self/stat").expect("readable"))
            .collect();
        assert!(value(&scrape(), "process_open_fds") > 50.0);
        drop(files);
    }
}
