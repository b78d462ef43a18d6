// SPDX-License-Identifier: Apache-2.0
//! A container's states and what may happen in each (runtime-spec runtime.md,
//! "State" and "Lifecycle").

use std::fmt;

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The child is setting itself up.
    Creating,
    /// The child waits to be started.
    Created,
    /// The child was told to run the program; whether it could is not known.
    Starting,
    /// The program runs.
    Running,
    /// The program is frozen.
    Paused,
    /// The first process has ended.
    Stopped,
    /// Being taken apart; nothing else may happen.
    Deleting,
}

/// What can be asked of a container, or happen to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The child is ready to be started.
    Ready,
    /// StartContainer.
    Start,
    /// The program was executed.
    Started,
    /// ExecProcess.
    Exec,
    /// SignalProcess to the first process or to all.
    Signal,
    /// PauseContainer.
    Pause,
    /// ResumeContainer.
    Resume,
    /// UpdateContainer.
    Update,
    /// StatsContainer, ListProcesses.
    Inspect,
    /// DeleteContainer.
    Delete,
    /// The first process has ended.
    Exited,
}

/// An event that a state does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What was asked.
    pub event: Event,
    /// The state it was asked in.
    pub state: State,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Deleting => "being deleted",
        })
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready => "become ready",
            Self::Start | Self::Started => "be started",
            Self::Exec => "run another process",
            Self::Signal => "be signalled",
            Self::Pause => "be paused",
            Self::Resume => "be resumed",
            Self::Update => "be updated",
            Self::Inspect => "be inspected",
            Self::Delete => "be deleted",
            Self::Exited => "end",
        })
    }
}

/// The state after `event` in `state`.
///
/// # Errors
/// When the state does not allow it.
pub fn next(state: State, event: Event) -> Result<State, Refused> {
    use Event as E;
    use State as S;
    Ok(match (state, event) {
        (S::Creating, E::Ready) => S::Created,
        (S::Created, E::Start) => S::Starting,
        (S::Starting, E::Started) => S::Running,

        // A process may be added to a created container, as runc allows.
        (S::Created | S::Running, E::Exec) => state,
        (S::Running, E::Pause) => S::Paused,
        (S::Paused, E::Resume) => S::Running,
        (S::Created | S::Starting | S::Running | S::Paused, E::Update) => state,

        // Signals reach the child at every stage; a stuck one can be killed.
        (S::Creating | S::Created | S::Starting | S::Running | S::Paused, E::Signal) => state,
        (
            S::Creating | S::Created | S::Starting | S::Running | S::Paused | S::Stopped,
            E::Inspect,
        ) => state,

        // What was never started may be deleted: its child is killed.
        (S::Created | S::Stopped, E::Delete) => S::Deleting,

        (S::Creating | S::Created | S::Starting | S::Running | S::Paused, E::Exited) => S::Stopped,
        (S::Deleting, E::Exited) => S::Deleting,

        (
            S::Creating
            | S::Created
            | S::Starting
            | S::Running
            | S::Paused
            | S::Stopped
            | S::Deleting,
            _,
        ) => return Err(Refused { event, state }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 7] = [
        State::Creating,
        State::Created,
        State::Starting,
        State::Running,
        State::Paused,
        State::Stopped,
        State::Deleting,
    ];

    const EVENTS: [Event; 11] = [
        Event::Ready,
        Event::Start,
        Event::Started,
        Event::Exec,
        Event::Signal,
        Event::Pause,
        Event::Resume,
        Event::Update,
        Event::Inspect,
        Event::Delete,
        Event::Exited,
    ];

    /// One row per state, one letter per event in the order above: the state
    /// that follows (c Creating, C Created, S Starting, R Running, P Paused,
    /// X Stopped, D Deleting) or `-` for refused.
    const TABLE: [(State, &str); 7] = [
        (State::Creating, "C---c---c-X"),
        (State::Created, "-S-CC--CCDX"),
        (State::Starting, "--R-S--SS-X"),
        (State::Running, "---RRP-RR-X"),
        (State::Paused, "----P-RPP-X"),
        (State::Stopped, "--------XD-"),
        (State::Deleting, "----------D"),
    ];

    fn letter(state: State) -> char {
        match state {
            State::Creating => 'c',
            State::Created => 'C',
            State::Starting => 'S',
            State::Running => 'R',
            State::Paused => 'P',
            State::Stopped => 'X',
            State::Deleting => 'D',
        }
    }

    #[test]
    fn every_pair_of_state_and_event() {
        assert_eq!(TABLE.map(|(state, _)| state), STATES);
        for (state, row) in TABLE {
            assert_eq!(row.len(), EVENTS.len());
            for (event, wanted) in EVENTS.into_iter().zip(row.chars()) {
                let got = next(state, event).map_or('-', letter);
                assert_eq!(got, wanted, "{event:?} in {state:?}");
            }
        }
    }
}
