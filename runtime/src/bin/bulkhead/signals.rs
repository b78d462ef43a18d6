// SPDX-License-Identifier: Apache-2.0
//! Signals for the process that a command stands for. Watched from the
//! beginning, so that none of them ends this process and leaves things behind.

use tokio::{
    signal::unix::{signal, SignalKind},
    sync::mpsc::{unbounded_channel, UnboundedReceiver},
};

/// What is passed on.
pub struct Signals {
    arrived: UnboundedReceiver<Option<u32>>,
}

impl Signals {
    /// Begins to watch.
    ///
    /// # Errors
    /// Those of the system.
    pub fn take() -> std::io::Result<Self> {
        let passed = [
            SignalKind::hangup(),
            SignalKind::interrupt(),
            SignalKind::quit(),
            SignalKind::terminate(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ];
        let resized = SignalKind::window_change();
        let (sender, arrived) = unbounded_channel();
        for kind in passed.into_iter().chain([resized]) {
            let number = (kind != resized).then(|| kind.as_raw_value().unsigned_abs());
            let mut watched = signal(kind)?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while watched.recv().await.is_some() && sender.send(number).is_ok() {}
            });
        }
        Ok(Self { arrived })
    }

    /// The next one; none: the terminal has another size.
    pub async fn next(&mut self) -> Option<u32> {
        match self.arrived.recv().await {
            Some(number) => number,
            // Whoever watches does so as long as this process lives.
            None => std::future::pending().await,
        }
    }
}
