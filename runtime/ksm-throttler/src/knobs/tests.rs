// SPDX-License-Identifier: Apache-2.0
use std::fs;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// Settings of kernel 6.1, and what 6.8 adds.
const OLD: [(&str, &str); 3] = [
    ("run", "0"),
    ("pages_to_scan", "100"),
    ("sleep_millisecs", "20"),
];
const NEW: [(&str, &str); 6] = [
    ("smart_scan", "0"),
    ("advisor_mode", "[none] scan-time"),
    ("advisor_max_cpu", "70"),
    ("advisor_target_scan_time", "200"),
    ("advisor_min_pages_to_scan", "500"),
    ("advisor_max_pages_to_scan", "30000"),
];

struct Tree {
    dir: TempDir,
}

impl Tree {
    fn new(with_advisor: bool, run: &str) -> Self {
        let tree = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(tree.path("ksm")).unwrap();
        let more = if with_advisor { &NEW[..] } else { &[] };
        for (name, value) in OLD.iter().chain(more) {
            tree.put(name, value);
        }
        tree.put("run", run);
        tree
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn put(&self, name: &str, value: &str) {
        fs::write(self.path("ksm").join(name), format!("{value}\n")).unwrap();
    }

    fn get(&self, name: &str) -> String {
        self.ksm().read(name).unwrap()
    }

    fn ksm(&self) -> Ksm {
        Ksm::find(&self.path("ksm")).unwrap()
    }

    fn take(&self) -> Knobs {
        Knobs::take(self.ksm(), &self.path("state.json"), 20).unwrap()
    }
}

fn scan(pages: u32) -> Decision {
    Decision::Scan(Effort {
        pages,
        pages_max: pages * 3,
        scan_seconds: 1,
    })
}

#[test]
fn found_values_are_on_disk_before_the_first_change_and_no_sooner() {
    let tree = Tree::new(false, "0");
    let mut knobs = tree.take();
    knobs.apply(Decision::Idle).unwrap();
    assert!(!tree.path("state.json").exists());
    knobs.apply(scan(300)).unwrap();
    assert!(tree.path("state.json").exists());
    assert_eq!(tree.get("run"), "1");
    assert_eq!(tree.get("pages_to_scan"), "300");
    knobs.apply(Decision::Pause).unwrap();
    assert_eq!(tree.get("run"), "0");
    knobs.apply(Decision::Idle).unwrap();
    assert_eq!(tree.get("pages_to_scan"), "100");
    assert!(!tree.path("state.json").exists());
}

#[test]
fn where_ksm_ran_idle_means_still_and_the_end_means_running() {
    let tree = Tree::new(false, "1");
    let mut knobs = tree.take();
    knobs.apply(Decision::Idle).unwrap();
    assert_eq!(tree.get("run"), "0");
    assert!(tree.path("state.json").exists());
    knobs.restore().unwrap();
    assert_eq!(tree.get("run"), "1");
    assert!(!tree.path("state.json").exists());
}

#[test]
fn what_somebody_sets_while_idle_is_what_is_put_back() {
    let tree = Tree::new(false, "1");
    let mut knobs = tree.take();
    knobs.apply(scan(300)).unwrap();
    // In a run it is the daemon's.
    tree.put("pages_to_scan", "1");
    knobs.apply(Decision::Idle).unwrap();
    assert_eq!(tree.get("pages_to_scan"), "100");
    tree.put("pages_to_scan", "555");
    knobs.apply(scan(300)).unwrap();
    drop(knobs);
    let mut knobs = tree.take();
    assert_eq!(tree.get("pages_to_scan"), "555");
    knobs.restore().unwrap();
    assert_eq!(tree.get("run"), "1");
}

#[test]
fn one_setting_that_fails_does_not_keep_the_others() {
    let tree = Tree::new(false, "1");
    tree.put("sleep_millisecs", "33");
    let mut knobs = tree.take();
    knobs.apply(scan(300)).unwrap();
    fs::remove_file(tree.path("ksm/pages_to_scan")).unwrap();
    let error = knobs.restore().unwrap_err().to_string();
    assert!(error.contains("pages_to_scan"), "{error}");
    assert_eq!(tree.get("sleep_millisecs"), "33");
    assert_eq!(tree.get("run"), "1");
    assert!(tree.path("state.json").exists());
}

#[test]
fn the_advisor_is_told_the_bound_and_switched_back_off() {
    let tree = Tree::new(true, "0");
    let mut knobs = tree.take();
    knobs.apply(scan(300)).unwrap();
    for (name, value) in [
        ("advisor_mode", "scan-time"),
        ("advisor_max_cpu", "20"),
        ("advisor_min_pages_to_scan", "300"),
        ("advisor_max_pages_to_scan", "900"),
        ("advisor_target_scan_time", "1"),
        ("smart_scan", "1"),
        // The kernel's own business.
        ("pages_to_scan", "100"),
    ] {
        assert_eq!(tree.get(name), value, "{name}");
    }
    knobs.restore().unwrap();
    assert_eq!(tree.get("advisor_mode"), "none");
    assert_eq!(tree.get("advisor_max_cpu"), "70");
}

#[test]
fn what_a_dead_daemon_left_is_put_back_first() {
    let tree = Tree::new(true, "1");
    let before = tree.ksm().settings().unwrap();
    tree.take().apply(scan(300)).unwrap();
    assert_ne!(tree.ksm().settings().unwrap(), before);
    let knobs = tree.take();
    assert_eq!(tree.ksm().settings().unwrap(), before);
    assert_eq!(knobs.found, before);
    assert!(!tree.path("state.json").exists());
}

fn decision() -> impl Strategy<Value = Decision> {
    prop_oneof![
        Just(Decision::Idle),
        Just(Decision::Pause),
        (16u32..100_000).prop_map(scan),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is decided, and wherever daemons die in between: in the end the
    /// values found are back, and nothing is left on disk.
    #[test]
    fn always_ends_at_the_values_found(
        with_advisor: bool,
        run in 0u8..=2,
        lives in prop::collection::vec(prop::collection::vec(decision(), 0..8), 1..4),
    ) {
        let tree = Tree::new(with_advisor, &run.to_string());
        let before = tree.ksm().settings().unwrap();
        let mut knobs = tree.take();
        for life in lives {
            knobs = tree.take();
            for decision in life {
                knobs.apply(decision).unwrap();
            }
        }
        knobs.restore().unwrap();
        prop_assert_eq!(tree.ksm().settings().unwrap(), before);
        prop_assert!(!tree.path("state.json").exists());
    }
}
