//! `relatch completions`: prints the completion script for a shell.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, failure::Failure, stream};

/// The arguments of `completions`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CompletionsArgs {
    /// Shell to print the script for
    shell: Shell,
}

const EXAMPLES: &str = "\
Examples:
  relatch completions bash \\
    > ~/.local/share/bash-completion/completions/relatch
  relatch completions fish > ~/.config/fish/completions/relatch.fish";

impl CompletionsArgs {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When standard output cannot be written to.
    pub fn run(&self) -> Result<(), Failure> {
        stream::write_out(&self.script())
    }

    fn script(&self) -> Vec<u8> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "relatch", &mut script);
        script
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_learns_the_commands() {
        for shell in [
            Shell::Bash,
            Shell::Zsh,
            Shell::Fish,
            Shell::Elvish,
            Shell::PowerShell,
        ] {
            let script = String::from_utf8(CompletionsArgs { shell }.script()).expect("text");
            assert!(script.contains("keyring"), "{shell}");
            assert!(script.contains("token-file"), "{shell}");
        }
    }
}
