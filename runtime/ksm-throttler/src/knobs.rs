// SPDX-License-Identifier: Apache-2.0
//! Carries decisions out, and puts back what was found.
//!
//! The values found are on disk before the first change. While nothing is to be
//! merged they are back in place, but that `run` is 0: where somebody had KSM
//! run all the time, the daemon takes that over. At the daemon's end all of
//! them are back.

use std::path::Path;

use crate::{
    controller::{Decision, Effort, SLEEP_MS},
    saved::Saved,
    sysfs::{self, Ksm, Settings},
    KsmError,
};

/// How far from the sizes wanted the advisor may be before it is told again.
const ADVISOR_SLACK: u64 = 2;

/// KSM's settings, in the daemon's hands.
#[derive(Debug)]
pub struct Knobs {
    ksm: Ksm,
    saved: Saved,
    found: Settings,
    cpu_percent: u32,
    advisor: bool,
    smart_scan: bool,
    idle: bool,
    /// What is set now, to write only what differs.
    set: Settings,
}

impl Knobs {
    /// Takes the settings over; changes none but to put back what a daemon that
    /// died has left. `cpu_percent` is the bound that the kernel's advisor is
    /// told, of one processor.
    ///
    /// # Errors
    /// The settings cannot be read, or what was left cannot be put back.
    pub fn take(ksm: Ksm, state_file: &Path, cpu_percent: u32) -> Result<Self, KsmError> {
        let saved = Saved::new(state_file, &ksm);
        if let Some(left) = saved.load()? {
            put_back(&ksm, &left)?;
            saved.remove()?;
            tracing::warn!(
                file = %state_file.display(),
                values = %told(&left),
                "put back the settings found by a daemon that died"
            );
        }
        let found = ksm.settings()?;
        let advisor = [
            sysfs::ADVISOR_MODE,
            sysfs::ADVISOR_MAX_CPU,
            sysfs::ADVISOR_TARGET,
            sysfs::ADVISOR_MIN_PAGES,
            sysfs::ADVISOR_MAX_PAGES,
        ]
        .iter()
        .all(|setting| ksm.has(setting));
        let smart_scan = ksm.has(sysfs::SMART_SCAN);
        tracing::info!(
            values = %told(&found),
            advisor,
            smart_scan,
            "settings found"
        );
        Ok(Self {
            set: found.clone(),
            ksm,
            saved,
            found,
            cpu_percent: cpu_percent.max(1),
            advisor,
            smart_scan,
            idle: true,
        })
    }

    /// Carries a decision out.
    ///
    /// # Errors
    /// A setting takes no value any more, or the values found cannot be saved.
    pub fn apply(&mut self, decision: Decision) -> Result<(), KsmError> {
        let was_idle = std::mem::replace(&mut self.idle, decision == Decision::Idle);
        if was_idle && !self.idle {
            self.adopt()?;
        }
        match decision {
            Decision::Idle => self.idle(),
            Decision::Pause => self.set(sysfs::RUN, "0"),
            Decision::Scan(effort) => self.scan(&effort),
        }
    }

    /// Puts everything back.
    ///
    /// # Errors
    /// Something could not be; the file with the values then stays.
    pub fn restore(&mut self) -> Result<(), KsmError> {
        // Should somebody have removed the file, this still knows.
        if self.saved.is_there() || self.set != self.found {
            put_back(&self.ksm, &self.found)?;
            self.saved.remove()?;
            self.set = self.found.clone();
            tracing::info!(values = %told(&self.found), "settings put back");
        }
        Ok(())
    }

    /// What somebody has set while nothing was to be merged is what is put back
    /// from now on.
    fn adopt(&mut self) -> Result<(), KsmError> {
        let now = self.ksm.settings()?;
        let mut changed = Settings::new();
        for (setting, value) in now {
            if self.set.get(&setting) != Some(&value) {
                changed.insert(setting, value);
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        tracing::info!(values = %told(&changed), "settings changed by somebody else");
        self.found.extend(changed.clone());
        self.set.extend(changed);
        if self.saved.is_there() {
            self.saved.replace(&self.found)?;
        }
        Ok(())
    }

    /// Everything back but that ksmd stands still.
    fn idle(&mut self) -> Result<(), KsmError> {
        let mut idle = self.found.clone();
        idle.insert(sysfs::RUN.into(), "0".into());
        if self.set == idle {
            return Ok(());
        }
        self.saved.save(&self.found)?;
        put_back(&self.ksm, &idle)?;
        if idle == self.found {
            // A crash from here on leaves nothing to put back.
            self.saved.remove()?;
        }
        self.set = idle;
        Ok(())
    }

    fn scan(&mut self, effort: &Effort) -> Result<(), KsmError> {
        if self.smart_scan {
            self.set(sysfs::SMART_SCAN, "1")?;
        }
        // Before the sizes: writing it wakes ksmd from however long a sleep.
        self.set(sysfs::SLEEP, &SLEEP_MS.to_string())?;
        if self.advisor {
            self.advise(effort)?;
        } else {
            self.set(sysfs::PAGES_TO_SCAN, &effort.pages.to_string())?;
        }
        self.set(sysfs::RUN, "1")
    }

    /// Lets the kernel choose the batch, between what the memory needs and what
    /// the bound allows. It does so once in each full scan; in between, and
    /// while `advisor_mode` is on, nobody else can set it. Switching it off and
    /// on again makes it begin anew with the fewest.
    fn advise(&mut self, effort: &Effort) -> Result<(), KsmError> {
        self.set(sysfs::ADVISOR_MAX_CPU, &self.cpu_percent.to_string())?;
        self.set(sysfs::ADVISOR_TARGET, &effort.scan_seconds.to_string())?;
        self.set(sysfs::ADVISOR_MAX_PAGES, &effort.pages_max.to_string())?;
        self.set(sysfs::ADVISOR_MIN_PAGES, &effort.pages.to_string())?;
        let is_on = self.set.get(sysfs::ADVISOR_MODE).map(String::as_str)
            == Some(sysfs::ADVISOR_SCAN_TIME)
            && self.set.get(sysfs::RUN).map(String::as_str) == Some("1");
        let chosen: u64 = self
            .ksm
            .read(sysfs::PAGES_TO_SCAN)?
            .parse()
            .unwrap_or_default();
        let wanted = u64::from(effort.pages) / ADVISOR_SLACK..=u64::from(effort.pages_max);
        if !is_on || !wanted.contains(&chosen) {
            self.write(sysfs::ADVISOR_MODE, sysfs::ADVISOR_OFF)?;
            self.write(sysfs::ADVISOR_MODE, sysfs::ADVISOR_SCAN_TIME)?;
        }
        Ok(())
    }

    /// Changes a setting unless it is so.
    fn set(&mut self, setting: &str, value: &str) -> Result<(), KsmError> {
        if self.set.get(setting).map(String::as_str) == Some(value) {
            return Ok(());
        }
        self.write(setting, value)
    }

    fn write(&mut self, setting: &str, value: &str) -> Result<(), KsmError> {
        self.saved.save(&self.found)?;
        self.ksm.write(setting, value)?;
        self.set.insert(setting.into(), value.into());
        Ok(())
    }
}

/// Puts settings back in the order that the kernel takes them: ksmd stands
/// still first and runs last, and `pages_to_scan` can be written only while the
/// advisor is off. One that fails does not keep the others from being put back;
/// the first failure is told.
fn put_back(ksm: &Ksm, settings: &Settings) -> Result<(), KsmError> {
    let mut order = vec![(sysfs::RUN, "0")];
    let mode = settings.get(sysfs::ADVISOR_MODE);
    if mode.is_some() {
        order.push((sysfs::ADVISOR_MODE, sysfs::ADVISOR_OFF));
    }
    for (setting, value) in settings {
        if ![sysfs::RUN, sysfs::ADVISOR_MODE].contains(&setting.as_str()) {
            order.push((setting, value));
        }
    }
    if let Some(mode) = mode.filter(|mode| *mode != sysfs::ADVISOR_OFF) {
        order.push((sysfs::ADVISOR_MODE, mode));
    }
    if let Some(run) = settings.get(sysfs::RUN).filter(|run| *run != "0") {
        order.push((sysfs::RUN, run));
    }
    let mut result = Ok(());
    for (setting, value) in order {
        result = result.and(ksm.write(setting, value));
    }
    result
}

/// For the log.
fn told(settings: &Settings) -> String {
    let words: Vec<String> = settings
        .iter()
        .map(|(setting, value)| format!("{setting}={value}"))
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests;
