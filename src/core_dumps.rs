//! Switches core dumps off: keys and peppers in the memory of a process must not reach a disk.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Prevents the kernel from writing core dumps of this process.
///
/// The limit prevents a file, also for the programs that the process starts. A program to which the
/// kernel passes dumps may ignore the limit; the kernel passes it no dump of a process that is not
/// dumpable (`core(5)`). Only root can attach a debugger to such a process (`ptrace(2)`).
///
/// # Errors
///
/// When a sandbox forbids it.
pub fn forbid() -> io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::process::{dumpable_behavior, getrlimit};

    use super::*;

    #[test]
    fn there_are_no_core_dumps() {
        forbid().expect("less is always allowed");
        let limit = getrlimit(Resource::Core);
        assert_eq!((limit.current, limit.maximum), (Some(0), Some(0)));
        let dumpable = dumpable_behavior().expect("it can be asked for");
        assert_eq!(dumpable, DumpableBehavior::NotDumpable);
    }
}
