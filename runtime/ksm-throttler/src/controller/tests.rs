// SPDX-License-Identifier: Apache-2.0
use proptest::prelude::*;

use super::{
    simulated::{Kind, Simulated},
    *,
};

const TICK: f64 = 0.1;

/// Steps until idle; gives how long that took in seconds, or panics.
fn until_idle(ksm: &mut Simulated, controller: &mut Controller, limit: f64) -> f64 {
    let mut passed = 0.0;
    loop {
        let decision = controller.step(&ksm.sample());
        ksm.obey(decision);
        if decision == Decision::Idle {
            return passed;
        }
        assert!(passed < limit, "still {decision:?} after {passed} s");
        ksm.pass(TICK);
        passed += TICK;
    }
}

#[test]
fn nothing_is_done_without_a_kick() {
    let mut controller = Controller::new(Limits::default());
    let mut ksm = Simulated::new(1.0);
    ksm.add(Kind::Same, 1000);
    for _ in 0..100 {
        assert_eq!(controller.step(&ksm.sample()), Decision::Idle);
        ksm.pass(TICK);
    }
    assert_eq!(ksm.sample().cpu, Duration::ZERO);
}

#[test]
fn a_kick_wakes_it_at_once() {
    let mut controller = Controller::new(Limits::default());
    let ksm = Simulated::new(1.0);
    assert_eq!(controller.step(&ksm.sample()), Decision::Idle);
    controller.kick(1);
    assert!(matches!(
        controller.step(&ksm.sample()),
        Decision::Scan(effort) if effort.pages >= 80
    ));
}

#[test]
fn identical_pods_are_merged_and_then_it_ends() {
    let mut controller = Controller::new(Limits::default());
    // As fast as hardware.
    let mut ksm = Simulated::new(0.1);
    for _ in 0..16 {
        ksm.add(Kind::Same, 7000);
        ksm.add(Kind::Unique, 1000);
        ksm.add(Kind::Changing, 500);
    }
    controller.kick(16);
    let took = until_idle(&mut ksm, &mut controller, 60.0);
    let saved = ksm.sample().counters.saved();
    assert_eq!(saved, 16 * 7000 - 1, "after {took} s");
    assert!(took < 15.0, "{took} s");
    assert_eq!(controller.totals().merged, saved);
    assert!(controller.totals().cpu <= ksm.sample().cpu);
}

#[test]
fn two_full_scans_without_gain_end_it() {
    let mut controller = Controller::new(Limits::default());
    let mut ksm = Simulated::new(0.1);
    ksm.add(Kind::Unique, 50_000);
    controller.kick(1);
    let took = until_idle(&mut ksm, &mut controller, 30.0);
    // What was left of the scan under way, perhaps one that was over too soon
    // to count, and two more.
    let scans = ksm.sample().counters.full_scans;
    assert!(
        (1 + BARREN_SCANS..=2 + BARREN_SCANS).contains(&scans),
        "{scans} after {took} s"
    );
    assert_eq!(controller.step(&ksm.sample()), Decision::Idle);
}

#[test]
fn a_gain_gives_it_two_more_scans() {
    let mut controller = Controller::new(Limits::default());
    let mut ksm = Simulated::new(0.1);
    ksm.add(Kind::Same, 50_000);
    controller.kick(1);
    until_idle(&mut ksm, &mut controller, 30.0);
    // The rest of one, checksums, merging, and two that gain nothing; here the
    // rest of one is a whole one and takes the checksums.
    let scans = ksm.sample().counters.full_scans;
    assert!(
        (2 + BARREN_SCANS..=3 + BARREN_SCANS).contains(&scans),
        "{scans}"
    );
}

#[test]
fn a_little_gain_for_much_work_is_none() {
    let limits = Limits {
        min_profit: 1e9,
        ..Limits::default()
    };
    let mut controller = Controller::new(limits);
    let mut ksm = Simulated::new(0.1);
    ksm.add(Kind::Same, 50_000);
    controller.kick(1);
    until_idle(&mut ksm, &mut controller, 30.0);
    assert_eq!(ksm.sample().counters.full_scans, 1 + BARREN_SCANS);
}

#[test]
fn a_kick_in_a_run_prolongs_it() {
    let mut controller = Controller::new(Limits::default());
    let mut ksm = Simulated::new(0.1);
    ksm.add(Kind::Same, 10_000);
    controller.kick(1);
    let alone = {
        let mut ksm = Simulated::new(0.1);
        ksm.add(Kind::Same, 10_000);
        let mut controller = Controller::new(Limits::default());
        controller.kick(1);
        until_idle(&mut ksm, &mut controller, 30.0)
    };
    let mut passed = 0.0;
    while passed < alone - 2.0 * TICK {
        let decision = controller.step(&ksm.sample());
        assert_ne!(decision, Decision::Idle, "after {passed} s of {alone}");
        ksm.obey(decision);
        ksm.pass(TICK);
        passed += TICK;
    }
    ksm.add(Kind::Same, 10_000);
    controller.kick(1);
    until_idle(&mut ksm, &mut controller, 30.0);
    assert_eq!(ksm.sample().counters.saved(), 19_999);
    assert_eq!(controller.totals().runs, 1);
}

#[test]
fn it_gives_up_where_ksmd_does_nothing() {
    let mut controller = Controller::new(Limits::default());
    let mut ksm = Simulated::new(1.0);
    controller.kick(1);
    let took = until_idle(&mut ksm, &mut controller, 30.0);
    assert!((4.9..5.5).contains(&took), "{took}");
}

#[test]
fn a_guest_that_starts_slowly_is_waited_for() {
    let mut controller = Controller::new(Limits::default());
    let mut ksm = Simulated::new(0.1);
    // Mergeable memory, nearly none of it touched yet.
    ksm.add(Kind::Unique, 20);
    controller.kick(1);
    for _ in 0..8 {
        let decision = controller.step(&ksm.sample());
        assert_ne!(decision, Decision::Idle);
        ksm.obey(decision);
        ksm.pass(TICK);
    }
    ksm.add(Kind::Same, 5000);
    until_idle(&mut ksm, &mut controller, 30.0);
    assert_eq!(ksm.sample().counters.saved(), 4999);
}

/// A bound of a fifth of a processor.
fn a_fifth() -> Limits {
    Limits {
        cpu_share: 0.2,
        ..Limits::default()
    }
}

#[test]
fn the_batch_follows_mergeable_memory() {
    let batch = |pages: u64| {
        let mut controller = Controller::new(a_fifth());
        let mut sample = Sample::default();
        sample.counters.pages_unshared = pages;
        controller.kick(1);
        match controller.step(&sample) {
            Decision::Scan(effort) => effort,
            other => panic!("{other:?}"),
        }
    };
    // A two hundredth of it every 5 ms, and a little more for the time it takes.
    assert!((82..105).contains(&batch(0).pages), "{:?}", batch(0));
    // And never more than the bound: 1.1 ms of 10 us.
    assert!(batch(1 << 30).pages <= 107, "{:?}", batch(1 << 30));
    assert_eq!(batch(1 << 30).pages_max, batch(1 << 30).pages);
}

#[derive(Debug, Clone)]
enum Happening {
    Pass(f64),
    Kick(u64),
    Add(Kind, usize),
    /// Pages cost this many times as much from now on.
    Cost(f64),
}

fn happening() -> impl Strategy<Value = Happening> {
    let kind = prop_oneof![Just(Kind::Same), Just(Kind::Unique), Just(Kind::Changing)];
    prop_oneof![
        8 => (0.08..0.3).prop_map(Happening::Pass),
        1 => (1u64..100).prop_map(Happening::Kick),
        2 => (kind, 1usize..5000).prop_map(|(kind, count)| Happening::Add(kind, count)),
        1 => (0.02..4.0).prop_map(Happening::Cost),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// In no span of time does ksmd use more than its share of it, the little
    /// that is saved up, and one step in which pages turn out to cost more.
    #[test]
    fn never_above_its_bound(
        share in 0.02..1.0f64,
        happenings in prop::collection::vec(happening(), 1..200),
    ) {
        let limits = Limits { cpu_share: share, ..Limits::default() };
        let mut controller = Controller::new(limits);
        let mut ksm = Simulated::new(1.0);
        controller.kick(1);
        ksm.add(Kind::Same, 2000);
        let (mut lowest, mut longest_step) = (0.0f64, 0.0f64);
        for happening in happenings {
            match happening {
                Happening::Kick(count) => controller.kick(count),
                Happening::Add(kind, count) => ksm.add(kind, count),
                Happening::Cost(cost) => ksm.cost = cost,
                Happening::Pass(seconds) => {
                    let decision = controller.step(&ksm.sample());
                    ksm.obey(decision);
                    ksm.pass(seconds);
                    longest_step = longest_step.max(seconds);
                }
            }
            let sample = ksm.sample();
            let above = sample.cpu.as_secs_f64() - share * sample.at.as_secs_f64();
            lowest = lowest.min(above);
            let slack = share * TICK + longest_step + ksm.longest;
            prop_assert!(
                above - lowest <= slack + 1e-6,
                "{} s above its share, {slack} allowed", above - lowest
            );
        }
    }

    /// Whatever happens, it ends once nothing happens any more.
    #[test]
    fn always_ends_idle(
        share in 0.05..1.0f64,
        happenings in prop::collection::vec(happening(), 1..100),
    ) {
        let mut controller = Controller::new(Limits { cpu_share: share, ..Limits::default() });
        let mut ksm = Simulated::new(1.0);
        for happening in happenings {
            match happening {
                Happening::Kick(count) => controller.kick(count),
                Happening::Add(kind, count) => ksm.add(kind, count),
                Happening::Cost(cost) => ksm.cost = cost,
                Happening::Pass(seconds) => {
                    let decision = controller.step(&ksm.sample());
                    ksm.obey(decision);
                    ksm.pass(seconds);
                }
            }
        }
        until_idle(&mut ksm, &mut controller, 3600.0);
    }
}

#[test]
fn the_bound_is_used_where_merging_pays() {
    let mut controller = Controller::new(a_fifth());
    let mut ksm = Simulated::new(1.0);
    ksm.add(Kind::Same, 400_000);
    controller.kick(1);
    for _ in 0..100 {
        let decision = controller.step(&ksm.sample());
        ksm.obey(decision);
        ksm.pass(TICK);
    }
    let used = ksm.sample().cpu.as_secs_f64() / 10.0;
    assert!((0.14..=0.21).contains(&used), "{used} of a processor");
}

/// Page-seconds of memory not yet saved, and processor time, over five
/// minutes from a burst of 16 pods on.
fn burst(share: Option<f64>, cost: f64) -> (f64, f64) {
    let limits = Limits {
        cpu_share: share.unwrap_or(1.0),
        ..Limits::default()
    };
    let mut controller = Controller::new(limits);
    let mut ksm = Simulated::new(cost);
    let mut unsaved = 0.0;
    let mut all = 0.0;
    for step in 0..3000 {
        if step % 5 == 0 && step < 80 {
            ksm.add(Kind::Same, 9000);
            ksm.add(Kind::Unique, 2000);
            ksm.add(Kind::Changing, 500);
            all += 9000.0;
            controller.kick(1);
        }
        if share.is_some() {
            let decision = controller.step(&ksm.sample());
            ksm.obey(decision);
        } else {
            ksm.default_settings();
        }
        ksm.pass(TICK);
        unsaved += (all - ksm.sample().counters.saved() as f64) * TICK;
    }
    (unsaved, ksm.sample().cpu.as_secs_f64())
}

#[test]
fn a_burst_of_pods_costs_less_than_with_the_kernel_s_defaults() {
    // At the cost of hardware.
    let (unsaved, cpu) = burst(None, 0.1);
    let (ours, our_cpu) = burst(Some(0.2), 0.1);
    assert!(ours < 0.2 * unsaved, "{ours} of {unsaved} page-seconds");
    assert!(our_cpu < 0.98 * cpu, "{our_cpu} of {cpu} s");
    // Where everything takes ten times as long the bound is what delays it.
    let (unsaved, cpu) = burst(None, 1.0);
    let (ours, our_cpu) = burst(Some(0.2), 1.0);
    assert!(ours < 0.9 * unsaved, "{ours} of {unsaved} page-seconds");
    assert!(our_cpu < 0.85 * cpu, "{our_cpu} of {cpu} s");
}
