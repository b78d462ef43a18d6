// SPDX-License-Identifier: Apache-2.0
//! What the box's kernel starts from: the init program and the modules.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cpio::Archive;
use super::error::{io_step, BoxError};
use super::hot;
use super::kernel::Kernel;
use super::modules::{Modules, NEEDED, USEFUL};

/// Where the init program finds its [`Plan`].
pub const PLAN_PATH: &str = "/plan.json";

/// What the init program is to set up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Modules to insert, in order: name, and whether the box needs it.
    pub modules: Vec<(String, bool)>,
    /// The directory with all modules, on the shared file system.
    pub modules_dir: PathBuf,
    /// Whether a disk with hot files is there.
    pub hot: bool,
    /// Directories to put a tmpfs on.
    pub tmpfs: Vec<PathBuf>,
}

/// The init program, which cargo puts beside this one (tests are one
/// directory below it). `BULKHEAD_BOX_INIT` names another.
///
/// # Errors
/// [`BoxError::NoInit`] when it is not built.
pub fn init_program() -> Result<PathBuf, BoxError> {
    const NAME: &str = "bulkhead-box-init";
    if let Some(path) = env::var_os("BULKHEAD_BOX_INIT").filter(|v| !v.is_empty()) {
        return Ok(path.into());
    }
    let exe = env::current_exe().map_err(io_step("find this program"))?;
    let dir = exe.parent().unwrap_or(Path::new("/"));
    let above = dir.parent().unwrap_or(Path::new("/"));
    [dir.join(NAME), above.join(NAME)]
        .into_iter()
        .find(|path| path.exists())
        .ok_or_else(|| BoxError::NoInit(dir.join(NAME)))
}

/// The archive for `kernel`; `plan` is completed with the modules.
///
/// # Errors
/// When a needed module or the init program is missing.
pub fn build(kernel: &Kernel, mut plan: Plan) -> Result<Vec<u8>, BoxError> {
    let read = |path: &Path| fs::read(path).map_err(io_step(format!("read {}", path.display())));
    let modules = Modules::scan(&kernel.modules).map_err(io_step("list the kernel's modules"))?;
    let resolve = |list: &[&str]| {
        modules
            .resolve(list)
            .map_err(io_step("read the kernel's modules"))
    };
    let (needed, missing) = resolve(NEEDED)?;
    if !missing.is_empty() {
        return Err(BoxError::Tool {
            tool: format!("the kernel package {}", kernel.release),
            detail: format!("it has no module {}", missing.join(", ")),
        });
    }
    let everything: Vec<&str> = NEEDED.iter().chain(USEFUL).copied().collect();
    let (all, _) = resolve(&everything)?;

    let mut archive = Archive::new();
    for dir in [
        "dev", "proc", "sys", "modules", "host", "hot", "upper", "root",
    ] {
        archive.dir(dir);
    }
    archive.char_dev("dev/console", 0o600, 5, 1);
    archive.char_dev("dev/null", 0o666, 1, 3);
    for (name, path) in all {
        archive.file(&format!("modules/{name}.ko"), 0o644, &read(&path)?);
        let need = needed.iter().any(|(n, _)| *n == name);
        plan.modules.push((name, need));
    }
    let init = init_program()?;
    let mut made = vec![String::new()];
    for path in hot::with_libraries(&init)?.into_iter().skip(1) {
        // By the name that the program asks for, not the one links lead to.
        let parent = path.parent().unwrap_or(Path::new("/"));
        for dir in parent.ancestors().collect::<Vec<_>>().into_iter().rev() {
            let name = dir.to_string_lossy().trim_start_matches('/').to_owned();
            if !made.contains(&name) {
                archive.dir(&name);
                made.push(name);
            }
        }
        archive.file(&path.to_string_lossy(), 0o755, &read(&path)?);
    }
    archive.file("init", 0o755, &read(&init)?);
    let json = serde_json::to_vec(&plan).expect("a plan holds only strings and numbers");
    archive.file(PLAN_PATH, 0o644, &json);
    Ok(archive.finish())
}
