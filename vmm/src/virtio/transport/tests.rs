// SPDX-License-Identifier: Apache-2.0

use super::*;

const AT: Addresses = Addresses {
    registers: 0xc000_0000,
    table: 0xc010_0000,
    config: 0xe810_0000,
};

const WINDOW: SharedMemory = SharedMemory {
    id: 3,
    address: 0x12_3440_0000,
    size: 0x5_0020_0000,
};

fn words(bytes: &[u8]) -> Vec<u32> {
    assert_eq!(bytes.len() % 4, 0);
    let words = bytes.chunks(4);
    words
        .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
        .collect()
}

/// As a guest reads the capability: BARs with their ranges (PCI Express 5.0
/// §7.8.5.3).
fn bars(body: &[u8]) -> Vec<(u32, u64, u64)> {
    let count = usize::from(body[0]);
    let mut rest = &words(&body[2..])[..];
    let mut bars = Vec::new();
    while let [entry, low, last, more @ ..] = rest {
        assert_eq!(entry >> 31, 1, "it is enabled");
        assert_eq!(entry >> 8 & 0xff, 0, "it is memory");
        let (mut start, mut offset) = (u64::from(low & !3), u64::from(last | 3));
        rest = more;
        if low & 2 != 0 {
            let [high, last_high, more @ ..] = rest else {
                panic!("no high words");
            };
            start |= u64::from(*high) << 32;
            offset |= u64::from(*last_high) << 32;
            rest = more;
        }
        let length = if low & 2 != 0 { 4 } else { 2 };
        assert_eq!(entry & 7, length);
        bars.push((entry >> 4 & 0xf, start, offset + 1));
    }
    assert_eq!(bars.len(), count);
    bars
}

#[test]
fn bars_are_where_they_are() {
    let registers = [
        (0, 0xc000_0000, BAR_SIZE),
        (1, 0xc010_0000, PAGE as u64),
        (2, 0xe810_0000, PAGE as u64),
    ];
    assert_eq!(bars(&fixed_bars(&AT, None)), registers);
    let with_window = bars(&fixed_bars(&AT, Some(WINDOW)));
    assert_eq!(with_window[..3], registers);
    assert_eq!(with_window[3..], [(4, WINDOW.address, WINDOW.size)]);
}

#[test]
fn shared_memory_is_a_whole_bar() {
    let body = shared_memory(WINDOW);
    // With the id and next pointer before them.
    assert_eq!(usize::from(body[0]), body.len() + 2);
    assert_eq!(body[1..6], [8, 4, 3, 0, 0]);
    assert_eq!(words(&body[6..]), [0, 0x20_0000, 0, 5]);
}
