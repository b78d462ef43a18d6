// SPDX-License-Identifier: Apache-2.0
//! Finding what a command line names.

use bulkhead_runtime::{
    config::Config,
    node::{self, Found, PATIENCE},
    operator::ContainerState,
};

use crate::Failure;

/// What is returned when there is nothing of that name.
const NOT_FOUND: u8 = 3;

/// There is nothing of that name.
pub fn absent(why: impl Into<String>) -> Failure {
    Failure {
        code: NOT_FOUND,
        why: why.into(),
    }
}

/// All sandboxes of this host.
pub fn all(config: &Config) -> Result<Vec<Found>, Failure> {
    let state_dir = &config.runtime.state_dir;
    node::all(state_dir, PATIENCE).map_err(|error| {
        format!("read {} (runtime.state_dir): {error}", state_dir.display()).into()
    })
}

/// Whether `name` means the thing `id` in `namespace`: the id, a beginning of
/// it, or either after the namespace and a slash.
fn means(name: &str, namespace: &str, id: &str) -> bool {
    let name = match name.split_once('/') {
        Some((space, name)) if space == namespace => name,
        Some(_) => return false,
        None => name,
    };
    !name.is_empty() && id.starts_with(name)
}

/// The one thing of several that `name` means; one that it names in full comes
/// before those that only begin like it.
fn one<T>(
    name: &str,
    what: &str,
    candidates: Vec<T>,
    names: impl Fn(&T) -> (String, String),
) -> Result<T, Failure> {
    let (full, partial): (Vec<T>, Vec<T>) = candidates
        .into_iter()
        .filter(|candidate| {
            let (namespace, id) = names(candidate);
            means(name, &namespace, &id)
        })
        .partition(|candidate| {
            let (namespace, id) = names(candidate);
            name == id || name == format!("{namespace}/{id}")
        });
    let mut found = if full.is_empty() { partial } else { full };
    match (found.pop(), found.len()) {
        (Some(one), 0) => Ok(one),
        (None, _) => Err(absent(format!("no {what} {name}; see bulkhead list"))),
        (Some(last), _) => {
            found.push(last);
            let names: Vec<String> = found
                .iter()
                .map(|found| {
                    let (namespace, id) = names(found);
                    format!("{namespace}/{id}")
                })
                .collect();
            Err(Failure::from(format!(
                "{name} may mean any of {}: write more of it",
                names.join(", ")
            )))
        }
    }
}

/// The sandbox of this name, or that with the container of this name.
pub fn sandbox(config: &Config, name: &str) -> Result<Found, Failure> {
    let all = all(config)?;
    let found = one(name, "sandbox", all.clone(), |found| {
        (found.namespace.clone(), found.id.clone())
    });
    match found {
        Err(failure) if failure.code == NOT_FOUND => {
            in_sandboxes(all, name).map(|(found, _)| found)
        }
        other => other,
    }
}

/// The container of this name, and its sandbox; a sandbox's name means the
/// only container in it.
pub fn container(config: &Config, name: &str) -> Result<(Found, ContainerState), Failure> {
    let all = all(config)?;
    let found = in_sandboxes(all.clone(), name);
    let Err(Failure {
        code: NOT_FOUND, ..
    }) = found
    else {
        return found;
    };
    let sandbox = one(name, "container", all, |found| {
        (found.namespace.clone(), found.id.clone())
    })?;
    let containers = sandbox.state.as_ref().map(|state| state.containers.clone());
    match containers.as_deref() {
        Some([container]) => Ok((sandbox, container.clone())),
        Some([]) => Err(absent(format!("sandbox {name} has no containers"))),
        Some(several) => {
            let names: Vec<&str> = several.iter().map(|c| c.id.as_str()).collect();
            Err(Failure::from(format!(
                "sandbox {name} has several containers, name one: {}",
                names.join(", ")
            )))
        }
        None => Err(Failure::from(format!(
            "sandbox {name} does not tell its containers: it is {}",
            sandbox.status
        ))),
    }
}

fn in_sandboxes(all: Vec<Found>, name: &str) -> Result<(Found, ContainerState), Failure> {
    let pairs: Vec<(Found, ContainerState)> = all
        .into_iter()
        .flat_map(|found| {
            let containers = found.state.as_ref().map(|state| state.containers.clone());
            containers
                .unwrap_or_default()
                .into_iter()
                .map(move |container| (found.clone(), container))
        })
        .collect();
    one(name, "container", pairs, |(found, container)| {
        (found.namespace.clone(), container.id.clone())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(name: &str, ids: &[(&str, &str)]) -> Result<String, (u8, String)> {
        let ids: Vec<(String, String)> = ids
            .iter()
            .map(|(namespace, id)| ((*namespace).into(), (*id).into()))
            .collect();
        one(name, "sandbox", ids, Clone::clone)
            .map(|(namespace, id)| format!("{namespace}/{id}"))
            .map_err(|failure| (failure.code, failure.why))
    }

    #[test]
    fn a_name_may_be_short_while_it_means_one() {
        let all = [("default", "web"), ("k8s.io", "web-1"), ("k8s.io", "db")];
        assert_eq!(pick("d", &all).unwrap(), "k8s.io/db");
        assert_eq!(pick("web", &all).unwrap(), "default/web");
        assert_eq!(pick("web-", &all).unwrap(), "k8s.io/web-1");
        assert_eq!(pick("k8s.io/web", &all).unwrap(), "k8s.io/web-1");
        let (code, why) = pick("we", &all).unwrap_err();
        assert_eq!(code, crate::FAILED);
        assert!(
            why.contains("default/web") && why.contains("k8s.io/web-1"),
            "{why}"
        );
        for nothing in ["x", "other/web", "", "k8s.io/"] {
            assert_eq!(pick(nothing, &all).unwrap_err().0, NOT_FOUND, "{nothing:?}");
        }
    }
}
