// SPDX-License-Identifier: Apache-2.0
//! Where the build products are, and a configuration that points at them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use bulkhead_vmm_api::Pages;

use crate::boxed::hot::with_libraries;

/// Where Debian's containernetworking-plugins has its programs.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";

/// The build products of the workspace.
#[derive(Clone, Debug)]
pub struct Products {
    target: PathBuf,
}

impl Products {
    /// Those below `BULKHEAD_TARGET`, or below cargo's `target` directory that
    /// this program is in.
    ///
    /// # Errors
    /// When this program is not in one.
    pub fn find() -> Result<Self> {
        if let Some(target) = env::var_os("BULKHEAD_TARGET").filter(|v| !v.is_empty()) {
            return Ok(Self {
                target: target.into(),
            });
        }
        let exe = env::current_exe().context("find this program")?;
        let target = exe
            .ancestors()
            .find(|dir| dir.join("CACHEDIR.TAG").exists())
            .with_context(|| format!("{} is in no target directory", exe.display()))?;
        Ok(Self {
            target: target.to_owned(),
        })
    }

    /// The target directory.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Directory of the programs, for `PATH`.
    pub fn bin_dir(&self) -> PathBuf {
        self.target.join("release")
    }

    /// One of the programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin_dir().join(name)
    }

    /// The guest kernel.
    pub fn kernel(&self) -> PathBuf {
        self.target.join("guest/vmlinux")
    }

    /// The guest image.
    pub fn image(&self) -> PathBuf {
        self.target.join("guest/rootfs.erofs")
    }

    /// A program of cri-tools, where it has been built.
    ///
    /// # Errors
    /// Why it has not.
    pub fn cri_tool(&self, name: &str) -> Result<PathBuf> {
        let dir = self.target.join("cri-tools");
        let program = dir.join(name);
        if program.is_file() {
            return Ok(program);
        }
        let why = fs::read_to_string(dir.join(format!("{name}.why-not"))).unwrap_or_default();
        match why.trim() {
            "" => bail!("{name} is not built (run `tests/cri-tools/build {name}`)"),
            why => bail!("{name} could not be built: {why}"),
        }
    }

    /// All that a container of Bulkhead needs.
    pub fn all(&self) -> Vec<PathBuf> {
        ["containerd-shim-bulkhead-v2", "bulkhead-vmm", "bulkhead"]
            .map(|name| self.program(name))
            .into_iter()
            .chain([self.kernel(), self.image()])
            .collect()
    }

    /// Checks that everything is built.
    ///
    /// # Errors
    /// Naming what is not.
    pub fn check(&self) -> Result<()> {
        let missing: Vec<String> = self
            .all()
            .into_iter()
            .filter(|path| !path.exists())
            .map(|path| path.display().to_string())
            .collect();
        if !missing.is_empty() {
            bail!("not built: {} (run `make build`)", missing.join(", "));
        }
        Ok(())
    }

    /// Everything that containers in a box read all the time: our products,
    /// this program, the image, the container engine and their libraries.
    ///
    /// # Errors
    /// When this program or `ldd` cannot be found.
    pub fn hot(&self) -> Result<Vec<PathBuf>> {
        let mut hot: Vec<PathBuf> = self.all().into_iter().filter(|p| p.exists()).collect();
        let tools = [
            "containerd",
            "ctr",
            "containerd-shim-runc-v2",
            "runc",
            "crun",
            "busybox",
            "ip",
            "tc",
            "sh",
            "mount",
            "umount",
        ];
        let mut programs: Vec<PathBuf> = tools.iter().filter_map(|t| which(t)).collect();
        programs.push(env::current_exe().context("find this program")?);
        programs.extend(self.cri_tool("crictl").ok());
        let plugins = ["bridge", "host-local", "loopback", "portmap"];
        let plugins = plugins.map(|name| Path::new(CNI_PLUGINS).join(name));
        programs.extend(plugins.into_iter().filter(|path| path.exists()));
        programs.extend(hot.iter().filter(|p| p.extension().is_none()).cloned());
        for program in programs {
            let files = with_libraries(&program).context("look for libraries")?;
            hot.extend(files.into_iter().filter(|f| f.exists()));
        }
        hot.extend(
            [
                "/etc/ld.so.cache",
                "/etc/passwd",
                "/etc/group",
                "/etc/nsswitch.conf",
            ]
            .map(PathBuf::from)
            .into_iter()
            .filter(|p| p.exists()),
        );
        hot.push(crate::image::cached()?);
        hot.sort();
        hot.dedup();
        Ok(hot)
    }

    /// A configuration for these products.
    pub fn config(&self, state_dir: &Path) -> Config {
        Config {
            vmm: self.program("bulkhead-vmm"),
            kernel: self.kernel(),
            image: self.image(),
            state_dir: state_dir.to_owned(),
            guest_console: None,
            merge_groups: Vec::new(),
            pages: Pages::Small,
        }
    }
}

/// What the tests set in Bulkhead's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The VMM.
    pub vmm: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The guest image.
    pub image: PathBuf,
    /// Where sandboxes keep their state.
    pub state_dir: PathBuf,
    /// Prefix of the files for guests' consoles.
    pub guest_console: Option<PathBuf>,
    /// Merge groups that a pod's annotation may name.
    pub merge_groups: Vec<String>,
    /// What pages guests' memory is in.
    pub pages: Pages,
}

/// How long the agent may take, in milliseconds, for its first call and for an
/// answer: a guest in a box on a busy machine is slow, and not to be given up.
const AGENT_PATIENCE: (u32, u32) = (180_000, 60_000);

impl Config {
    /// Its text.
    pub fn toml(&self) -> String {
        let quote = |path: &Path| format!("{:?}", path.to_string_lossy());
        let mut text = format!(
            "[hypervisor]\npath = {}\nkernel = {}\nimage = {}\nallowed_merge_groups = {:?}\npages = {:?}\n\n[agent]\nready_timeout_ms = {}\nrpc_timeout_ms = {}\n\n[runtime]\nstate_dir = {}\nlog_level = \"info\"\n",
            quote(&self.vmm),
            quote(&self.kernel),
            quote(&self.image),
            self.merge_groups,
            self.pages.name(),
            AGENT_PATIENCE.0,
            AGENT_PATIENCE.1,
            quote(&self.state_dir),
        );
        if let Some(console) = &self.guest_console {
            text.push_str(&format!("guest_console = {}\n", quote(console)));
        }
        text
    }

    /// Writes it to `path`.
    ///
    /// # Errors
    /// Those of writing.
    pub fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, self.toml()).with_context(|| format!("write {}", path.display()))
    }
}

/// Finds a program as a shell does, and in the system's own directories.
pub fn which(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_points_at_the_products() {
        let products = Products {
            target: "/w/target".into(),
        };
        let mut config = products.config(Path::new("/run/x"));
        config.guest_console = Some("/run/x/console-".into());
        config.merge_groups = vec!["red".into(), "blue".into()];
        let text = config.toml();
        for line in [
            "path = \"/w/target/release/bulkhead-vmm\"",
            "kernel = \"/w/target/guest/vmlinux\"",
            "image = \"/w/target/guest/rootfs.erofs\"",
            "allowed_merge_groups = [\"red\", \"blue\"]",
            "state_dir = \"/run/x\"",
            "guest_console = \"/run/x/console-\"",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn what_is_not_built_is_named() {
        let products = Products {
            target: "/nonexistent".into(),
        };
        let error = products.check().unwrap_err().to_string();
        assert!(error.contains("/nonexistent/guest/vmlinux"), "{error}");
    }
}
