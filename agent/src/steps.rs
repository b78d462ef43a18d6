// SPDX-License-Identifier: Apache-2.0
//! When the parts of a start were done: the agent's and, in the child, those
//! that it tells with its "ready".

use bulkhead_agent_protocol::agent;

use crate::sys::host::monotonic_ns;

/// A part of a start, in the order in which they are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// The request has arrived.
    Received,
    /// The container's cgroup is there, with its limits.
    Group,
    /// The streams to the host are connected.
    Streams,
    /// The child runs, without what is the agent's.
    Born,
    /// The namespaces are there and the root file system is bound.
    Root,
    /// The mounts are made.
    Mounts,
    /// The device nodes are made.
    Devices,
    /// The guest's root is gone.
    Pivot,
    /// Read-only and masked paths are covered.
    Masks,
    /// The program's user is become and the program found.
    User,
    /// The agent knows.
    Ready,
}

const ALL: [(Step, &str); 11] = [
    (Step::Received, "received"),
    (Step::Group, "group"),
    (Step::Streams, "streams"),
    (Step::Born, "born"),
    (Step::Root, "root"),
    (Step::Mounts, "mounts"),
    (Step::Devices, "devices"),
    (Step::Pivot, "pivot"),
    (Step::Masks, "masks"),
    (Step::User, "user"),
    (Step::Ready, "ready"),
];

/// Bytes of one step in a message.
const RECORD: usize = 1 + size_of::<u64>();

/// Steps and when each was done, on CLOCK_MONOTONIC in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Steps(Vec<(Step, u64)>);

impl Steps {
    /// A request has arrived now.
    pub fn received() -> Self {
        let mut steps = Self::default();
        steps.done(Step::Received);
        steps
    }

    /// `step` has been done now.
    pub fn done(&mut self, step: Step) {
        self.0.push((step, monotonic_ns()));
    }

    /// Those of a child, which it has told.
    pub fn extend(&mut self, told: Self) {
        self.0.extend(told.0);
    }

    /// As bytes for [`Self::decode`].
    pub fn encode(&self) -> Vec<u8> {
        let records = self.0.iter();
        records
            .flat_map(|(step, at)| std::iter::once(*step as u8).chain(at.to_le_bytes()))
            .collect()
    }

    /// What [`Self::encode`] gave; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let record = |bytes: &[u8]| {
            let (step, at) = bytes.split_first()?;
            let (step, _) = ALL.get(usize::from(*step))?;
            Some((*step, u64::from_le_bytes(at.try_into().ok()?)))
        };
        bytes
            .chunks(RECORD)
            .map(record)
            .collect::<Option<_>>()
            .map(Self)
    }

    /// As the protocol has them.
    pub fn to_protocol(&self) -> Vec<agent::Step> {
        let told = self.0.iter().map(|(step, at)| agent::Step {
            name: ALL[*step as usize].1.into(),
            at_ns: *at,
            ..Default::default()
        });
        told.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_survive_a_message() {
        let mut steps = Steps::default();
        for (step, _) in ALL {
            steps.done(step);
        }
        let bytes = steps.encode();
        assert_eq!(Steps::decode(&bytes), Some(steps.clone()));
        assert_eq!(Steps::decode(&bytes[1..]), None);
        assert_eq!(Steps::decode(&[99; RECORD]), None);
        let names: Vec<_> = steps.to_protocol().into_iter().map(|s| s.name).collect();
        assert_eq!(names, ALL.map(|(_, name)| name));
        for (place, (step, _)) in ALL.iter().enumerate() {
            assert_eq!(*step as usize, place);
        }
    }
}
