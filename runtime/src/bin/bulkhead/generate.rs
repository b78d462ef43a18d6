// SPDX-License-Identifier: Apache-2.0
//! What is made from the definition of the command line: completions for
//! shells and manual pages.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::{Args, Command, CommandFactory, ValueEnum};
use clap_complete::{aot, generate};
use clap_mangen::Man;

/// Section of the manual: system administration.
const SECTION: &str = "8";

/// Completion for a shell.
#[derive(Debug, Args)]
pub struct Completion {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Manual pages.
#[derive(Debug, Args)]
pub struct Pages {
    /// Directory to write them to
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Fish,
    Zsh,
}

impl Completion {
    /// Prints it.
    pub fn execute(&self) {
        let shell = match self.shell {
            Shell::Bash => aot::Shell::Bash,
            Shell::Fish => aot::Shell::Fish,
            Shell::Zsh => aot::Shell::Zsh,
        };
        let mut command = crate::Cli::command();
        generate(shell, &mut command, "bulkhead", &mut io::stdout());
    }
}

impl Pages {
    /// Writes those of this command, of each of its commands, and of the KSM
    /// throttler.
    pub fn execute(&self) -> Result<(), String> {
        let mut command = crate::Cli::command();
        command.build();
        let mut pages = vec![(command.clone(), crate::SECTIONS)];
        for inner in command.get_subcommands().filter(|c| !c.is_hide_set()) {
            // What it is called on the command line is what the page says.
            let name = format!("bulkhead-{}", inner.get_name());
            if inner.get_name() != "help" {
                pages.push((inner.clone().display_name(name), ""));
            }
        }
        pages.push((
            bulkhead_ksm_throttler::cli::Cli::command(),
            bulkhead_ksm_throttler::cli::SECTIONS,
        ));
        for (command, sections) in pages {
            write(&self.directory, command, sections)
                .map_err(|error| format!("write to {}: {error}", self.directory.display()))?;
        }
        Ok(())
    }
}

fn write(directory: &Path, command: Command, sections: &str) -> io::Result<()> {
    let name = command
        .get_display_name()
        .unwrap_or(command.get_name())
        .to_owned();
    let mut page = Vec::new();
    Man::new(command)
        .section(SECTION)
        .manual("System administration")
        .render(&mut page)?;
    page.extend_from_slice(sections.as_bytes());
    fs::create_dir_all(directory)?;
    fs::write(directory.join(format!("{name}.{SECTION}")), page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        crate::Cli::command().debug_assert();
        bulkhead_ksm_throttler::cli::Cli::command().debug_assert();
    }

    #[test]
    fn a_configuration_may_go_without_a_name() {
        use clap::Parser as _;
        let config = |line: &[&str]| crate::Cli::try_parse_from(line).unwrap().config;
        assert_eq!(config(&["bulkhead", "check"]), None);
        assert_eq!(config(&["bulkhead", "check", "--config"]), Some(None));
        let named = Some(Some(PathBuf::from("/x")));
        assert_eq!(config(&["bulkhead", "check", "--config", "/x"]), named);
        assert_eq!(config(&["bulkhead", "--config", "/x", "list"]), named);
    }

    #[test]
    fn every_command_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        let pages = Pages {
            directory: dir.path().join("man8"),
        };
        pages.execute().unwrap();
        let read = |name: &str| fs::read_to_string(pages.directory.join(name)).unwrap();
        let page = read("bulkhead.8");
        assert!(page.contains(".SH FILES"), "{page}");
        for inner in crate::Cli::command().get_subcommands() {
            let name = format!("bulkhead-{}.8", inner.get_name());
            assert_eq!(
                pages.directory.join(&name).exists(),
                !inner.is_hide_set(),
                "{name}"
            );
        }
        assert!(read("bulkhead-exec.8").contains("bulkhead exec"));
        let page = read("bulkhead-ksm-throttler.8");
        assert!(
            page.contains("min\\-profit") && page.contains(".SH SECURITY"),
            "{page}"
        );
    }
}
