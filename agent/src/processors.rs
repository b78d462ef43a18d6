// SPDX-License-Identifier: Apache-2.0
//! The guest's processors: the machine has all of them from the start, and the
//! kernel uses as many as it is told to.

use std::fs;
use std::path::Path;

use bulkhead_agent_protocol::agent;

use crate::error::{AgentError, Context, Result};

const CPUS: &str = "/sys/devices/system/cpu";

/// Has the kernel use so many processors, the first ones.
///
/// # Errors
/// There are not so many; one cannot be started or stopped.
pub fn set_online(request: &agent::OnlineCpusRequest, in_guest: bool) -> Result<agent::CpusReply> {
    if !in_guest {
        return Err(AgentError::Precondition(
            "outside a guest the machine's processors are not the agent's".into(),
        ));
    }
    set_online_in(Path::new(CPUS), request.count)
}

fn set_online_in(cpus: &Path, count: u32) -> Result<agent::CpusReply> {
    let list = |name: &str| {
        let path = cpus.join(name);
        let text = fs::read_to_string(&path).step(|| format!("read {}", path.display()))?;
        parse(&text).ok_or_else(|| AgentError::Invalid(format!("{}: {text:?}", path.display())))
    };
    let present = list("present")?;
    let there = present.len();
    if count == 0 || count as usize > there {
        return Err(AgentError::Invalid(format!(
            "count: {count} is not from 1 to the {there} processors that there are"
        )));
    }
    let online = list("online")?;
    for (index, cpu) in present.iter().enumerate() {
        let wanted = index < count as usize;
        if wanted != online.contains(cpu) {
            let path = cpus.join(format!("cpu{cpu}/online"));
            let value = if wanted { "1" } else { "0" };
            fs::write(&path, value).step(|| format!("write {value} to {}", path.display()))?;
        }
    }
    Ok(agent::CpusReply {
        online: number(list("online")?.len()),
        present: number(there),
        ..Default::default()
    })
}

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Numbers in the kernel's form, `0-2,5`; none: it is not that.
fn parse(list: &str) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        // More than a kernel can have.
        if last > 8192 {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_the_kernels() {
        assert_eq!(parse("0\n"), Some(vec![0]));
        assert_eq!(parse("0-2,5,7-8\n"), Some(vec![0, 1, 2, 5, 7, 8]));
        assert_eq!(parse("\n"), Some(vec![]));
        for wrong in ["a", "1-", "0-99999999"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_first_processors_are_used() {
        let root = tempfile::tempdir().unwrap();
        let file = |name: &str| root.path().join(name);
        fs::write(file("present"), "0-3\n").unwrap();
        fs::write(file("online"), "0-1\n").unwrap();
        // The first one is never asked: it has no such file.
        for cpu in 1..4 {
            fs::create_dir(file(&format!("cpu{cpu}"))).unwrap();
            fs::write(file(&format!("cpu{cpu}/online")), "-").unwrap();
        }
        let said = || {
            let of = |cpu| fs::read_to_string(file(&format!("cpu{cpu}/online"))).unwrap();
            (1..4).map(of).collect::<String>()
        };
        let reply = set_online_in(root.path(), 3).unwrap();
        assert_eq!((reply.online, reply.present), (2, 4));
        assert_eq!(said(), "-1-");
        set_online_in(root.path(), 1).unwrap();
        assert_eq!(said(), "01-");
        for wrong in [0, 5] {
            let error = set_online_in(root.path(), wrong).unwrap_err().to_string();
            assert!(error.contains("count:"), "{error}");
        }
    }
}
