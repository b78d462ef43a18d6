// SPDX-License-Identifier: Apache-2.0
//! The timeline of a start, as the shim logs it.

/// What the shim's log line is called.
const MESSAGE: &str = "start timeline";

/// The points in their order: field of the log line, and words for people.
pub const POINTS: [(&str, &str); 7] = [
    ("shim_start", "shim start"),
    ("vmm_start", "VMM start"),
    ("kernel_entry", "kernel entry"),
    ("agent_ready", "agent ready"),
    ("sandbox_ready", "sandbox ready"),
    ("container_started", "container started"),
    ("first_output", "first output"),
];

/// Milliseconds since the start of the shim for each of [`POINTS`].
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline(pub [f64; POINTS.len()]);

impl Timeline {
    /// The last timeline in a log; `None` when there is no complete one.
    pub fn find(log: &str) -> Option<Self> {
        log.lines()
            .rev()
            .filter_map(|line| line.split_once(MESSAGE))
            .find_map(|(before, after)| Self::parse(&format!("{before} {after}")))
    }

    fn parse(line: &str) -> Option<Self> {
        let mut stamps = [0.0; POINTS.len()];
        for (stamp, (field, _)) in stamps.iter_mut().zip(POINTS) {
            let at = line.find(&format!("{field}="))? + field.len() + 1;
            let text: String = line[at..]
                .chars()
                .skip_while(|c| *c == '"')
                .take_while(|c| c.is_ascii_digit() || *c == '.')
                .collect();
            *stamp = text.parse().ok()?;
        }
        Some(Self(stamps))
    }

    /// A table for people: when, and how long since the point before.
    pub fn table(&self) -> String {
        let mut text = format!("{:<20}{:>12}{:>12}\n", "", "at ms", "took ms");
        let mut before = 0.0;
        for (at, (_, words)) in self.0.iter().zip(POINTS) {
            text.push_str(&format!("{words:<20}{at:>12.3}{:>12.3}\n", at - before));
            before = *at;
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "time=\"2026\" level=info msg=\"x\"\n2026 INFO shim: start timeline shim_start=0.000 vmm_start=1.500 kernel_entry=20.25 agent_ready=400.000 sandbox_ready=410.125 container_started=450.000 first_output=460.5 id=\"a\"\nother line\n";

    #[test]
    fn the_log_line_is_found_and_read() {
        let timeline = Timeline::find(LINE).unwrap();
        assert_eq!(timeline.0, [0.0, 1.5, 20.25, 400.0, 410.125, 450.0, 460.5]);
        let table = timeline.table();
        assert!(table.contains("kernel entry"), "{table}");
        assert!(table.contains("379.750"), "{table}");
    }

    #[test]
    fn an_incomplete_line_is_none() {
        assert_eq!(
            Timeline::find("start timeline shim_start=0.0 vmm_start=1.0"),
            None
        );
        assert_eq!(Timeline::find(""), None);
    }
}
