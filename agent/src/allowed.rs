// SPDX-License-Identifier: Apache-2.0
//! Which calls the agent answers. It is told at boot, by a kernel parameter,
//! and no call can change it afterwards.

use std::collections::{BTreeSet, HashMap};

use async_trait::async_trait;
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::{get_status, Code};

use crate::error::{AgentError, Result};

/// The kernel parameter: names of calls with commas between. With `+` before
/// each they come to those that are answered without it.
pub const PARAMETER: &str = "bulkhead.rpcs";

/// Calls that must be asked for; without the parameter all others are answered.
const ON_REQUEST: [&str; 1] = ["ExecGuest"];

/// The list in a kernel's command line; the last one counts.
pub fn in_cmdline(cmdline: &str) -> Option<&str> {
    let words = cmdline.split_ascii_whitespace();
    words
        .filter_map(|word| word.strip_prefix(PARAMETER)?.strip_prefix('='))
        .next_back()
}

/// The services with only the calls of `list`; all other calls are refused.
///
/// # Errors
/// [`AgentError::Invalid`] for a name that is no call's.
pub fn only(
    mut services: HashMap<String, Service>,
    list: Option<&str>,
) -> Result<HashMap<String, Service>> {
    let names = list.unwrap_or_default().split(',');
    let named: Vec<&str> = names.filter(|name| !name.is_empty()).collect();
    let besides = named.iter().filter(|name| name.starts_with('+')).count();
    if besides > 0 && besides < named.len() {
        return Err(AgentError::Invalid(format!(
            "{PARAMETER}: some names have a + and some have not"
        )));
    }
    let mut allowed: BTreeSet<String> = named
        .iter()
        .map(|name| name.trim_start_matches('+').to_owned())
        .collect();
    let known = |name: &&String| services.values().any(|s| s.methods.contains_key(*name));
    if let Some(name) = allowed.iter().find(|name| !known(name)) {
        return Err(AgentError::Invalid(format!(
            "{PARAMETER}: there is no call {name:?}"
        )));
    }
    if list.is_none() || besides > 0 {
        let all = services.values().flat_map(|s| s.methods.keys());
        let usual = all.filter(|name| !ON_REQUEST.contains(&name.as_str()));
        allowed.extend(usual.cloned());
    }
    for (name, method) in services.values_mut().flat_map(|s| &mut s.methods) {
        if !allowed.contains(name) {
            *method = Box::new(Refused(name.clone()));
        }
    }
    Ok(services)
}

/// In place of a call that is not allowed.
struct Refused(String);

#[async_trait]
impl MethodHandler for Refused {
    async fn handler(&self, _: TtrpcContext, _: ttrpc::Request) -> ttrpc::Result<ttrpc::Response> {
        let text = format!("{} is not among the calls of {PARAMETER}", self.0);
        // An error of a handler, whatever its code, is UNKNOWN to the client.
        let mut response = ttrpc::Response::new();
        response.set_status(get_status(Code::PERMISSION_DENIED, text));
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_parameter_counts() {
        let line = "console=ttyS0 bulkhead.rpcs=A xbulkhead.rpcs=B bulkhead.rpcs=C,D quiet\n";
        assert_eq!(in_cmdline(line), Some("C,D"));
        assert_eq!(in_cmdline("bulkhead.rpcs= quiet"), Some(""));
        assert_eq!(in_cmdline("console=ttyS0 bulkhead.rpcsx=A"), None);
    }
}
