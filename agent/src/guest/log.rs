// SPDX-License-Identifier: Apache-2.0
//! The kernel's log (Linux: ABI/testing/dev-kmsg), from a record on.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use bulkhead_agent_protocol::agent;

use crate::error::{Context, Result};

/// Longest record: the kernel's buffer for one.
const RECORD: usize = 8192;
/// Most text of an answer, whatever is asked for.
const MOST: usize = 256 << 10;
/// Most records that one answer goes through, also those before `from`.
const RECORDS: usize = 65_536;

/// Records from the number `from` on, up to `max_bytes` of text.
///
/// # Errors
/// The log cannot be opened, or read.
pub fn read(request: &agent::KernelLogRequest) -> Result<agent::KernelLogReply> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .step(|| "open /dev/kmsg")?;
    let most = usize::try_from(request.max_bytes).unwrap_or(MOST).min(MOST);
    collect(file, request.from, most).step(|| "read /dev/kmsg")
}

fn collect(mut file: File, from: u64, most: usize) -> std::io::Result<agent::KernelLogReply> {
    let mut reply = agent::KernelLogReply {
        next: from,
        ..Default::default()
    };
    let mut record = vec![0; RECORD];
    let mut taken = 0;
    for _ in 0..RECORDS {
        let count = match file.read(&mut record) {
            Ok(0) => return Ok(reply),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(reply),
            // Overwritten meanwhile: the next one is the oldest there is.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => continue,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let Some((number, line)) = parse(&record[..count]) else {
            continue;
        };
        if number < from {
            continue;
        }
        taken += line.len();
        if taken > most && !reply.lines.is_empty() {
            reply.more = true;
            return Ok(reply);
        }
        reply.next = number.saturating_add(1);
        reply.lines.push(line);
    }
    reply.more = true;
    Ok(reply)
}

/// A record's number, and the line that dmesg(1) would show of it.
fn parse(record: &[u8]) -> Option<(u64, String)> {
    let text = String::from_utf8_lossy(record);
    let (head, rest) = text.split_once(';')?;
    let mut fields = head.split(',');
    let number: u64 = fields.nth(1)?.parse().ok()?;
    let micros: u64 = fields.next()?.parse().ok()?;
    // Lines behind the first are notes about the device.
    let line = rest.lines().next().unwrap_or_default();
    let (seconds, fraction) = (micros / 1_000_000, micros % 1_000_000);
    Some((number, format!("[{seconds:5}.{fraction:06}] {line}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_become_lines() {
        let record = b"6,339,5140900,-;NET: Registered protocol family\n SUBSYSTEM=net\n";
        let wanted = "[    5.140900] NET: Registered protocol family";
        assert_eq!(parse(record), Some((339, wanted.into())));
        assert_eq!(parse(b"nonsense"), None);
        assert_eq!(parse(b"6,x,1,-;y"), None);
    }
}
