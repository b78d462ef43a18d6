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

/// Nobody whom messages and notifications reach.
struct Nobody;

impl Messages for Nobody {
    fn send(&self, _: crate::pci::host::Message) -> io::Result<()> {
        Ok(())
    }
    fn trap_tables(&self) {}
}

impl NotifyRegistrar for Nobody {
    fn register_notify(&self, _: &EventFd, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn unregister_notify(&self, _: &EventFd, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn gather_writes(&self, _: u64, _: u32) {}
    fn gather_port_writes(&self, _: u16, _: u32) {}
}

/// An entropy device's function, with what must stay meanwhile.
struct Machine {
    function: VirtioPci,
    _handler: Arc<Mutex<dyn crate::event::EventHandler>>,
    _event_loop: crate::event::EventLoop,
}

fn machine() -> Machine {
    let memory = vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 20)]);
    let event_loop =
        crate::event::EventLoop::spawn("test", crate::confine::seccomp::Worker::Devices).unwrap();
    let device = Arc::new(Mutex::new(crate::virtio::rng::Rng::new()));
    let handler: Arc<Mutex<dyn crate::event::EventHandler>> = device.clone();
    let wiring = Wiring {
        messages: Arc::new(Nobody),
        table: Page::alone().unwrap(),
        config: Page::alone().unwrap(),
        notify: Arc::new(Nobody),
        memory: vm_memory::GuestMemoryAtomic::new(memory.unwrap()),
        event_loop: event_loop.handle(),
    };
    let weak = Arc::downgrade(&handler);
    Machine {
        function: VirtioPci::new(device, weak, AT, 0, wiring).unwrap(),
        _handler: handler,
        _event_loop: event_loop,
    }
}

#[test]
fn a_driver_that_starts_at_the_wrong_time_has_not_started() {
    // Before it has agreed on features, and when it has given up.
    for early in [&[4_u8][..], &[1, 5], &[1, 3, 7], &[1, 3, 131, 135]] {
        let machine = machine();
        let write = |value: u8| machine.function.write_bar(COMMON + 0x14, &[value]);
        early.iter().for_each(|status| write(*status));
        let mut status = [0];
        machine.function.read_bar(COMMON + 0x14, &mut status);
        let last = early.last().unwrap();
        assert_eq!(status[0], last & !status::DRIVER_OK, "{early:?}");
        // And so it is after a restore.
        let state = machine.function.save().unwrap();
        let clone = self::machine();
        clone.function.restore(&state).unwrap();
        let mut again = [0];
        clone.function.read_bar(COMMON + 0x14, &mut again);
        assert_eq!(again, status, "{early:?}");
    }
}

#[test]
fn a_driver_that_is_wrong_again_and_again_does_not_fill_the_log() {
    const TIMES: usize = 10_000;
    let Machine { function, .. } = &machine();
    let write = |offset, bytes: &[u8]| function.write_bar(COMMON + offset, bytes);
    let begin = || {
        for status in [0, 1, 3] {
            write(0x14, &[status]);
        }
        // VIRTIO_F_VERSION_1.
        write(0x08, &1_u32.to_le_bytes());
        write(0x0c, &1_u32.to_le_bytes());
        write(0x14, &[11]);
    };
    let end = |lines: &mut usize| {
        write(0x14, &[15]);
        let mut status = [0];
        function.read_bar(COMMON + 0x14, &mut status);
        assert_eq!(status[0] & status::NEEDS_RESET, status::NEEDS_RESET);
        *lines += 1;
    };
    let mut wrong = 0;
    let lines = crate::log::tests::lines(|| {
        for _ in 0..TIMES {
            begin();
            // A queue that lies beyond the end of memory.
            write(0x16, &[0, 0]);
            write(0x20, &(1_u64 << 40).to_le_bytes());
            write(0x1c, &[1, 0]);
            end(&mut wrong);
            // And none at all.
            begin();
            end(&mut wrong);
        }
    });
    assert_eq!(wrong, 2 * TIMES);
    // Two places; a slow machine sees some of them anew.
    assert!(lines.len() >= 2, "{lines:#?}");
    assert!(
        lines.len() <= 2 * 2 * crate::log::BURST as usize,
        "{lines:#?}"
    );
}
