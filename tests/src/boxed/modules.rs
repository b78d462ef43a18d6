// SPDX-License-Identifier: Apache-2.0
//! Kernel modules and what they stand on.
//!
//! A package's modules come without `modules.dep` (its installation makes
//! that), so the dependencies are read from where depmod reads them: the
//! `depends=` entry in each module's `.modinfo`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Without these the box does not come up.
pub const NEEDED: &[&str] = &[
    // libcrc32c, below erofs and nf_tables, asks for it only when it starts.
    "crc32c_generic",
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_blk",
    "erofs",
    "kvm_amd",
];

/// What container engines, networks and Bulkhead itself use.
pub const USEFUL: &[&str] = &[
    "tun",
    "bridge",
    "veth",
    "vhost_net",
    "act_mirred",
    "cls_u32",
    "cls_matchall",
    "sch_ingress",
    "fuse",
    "loop",
    "nf_tables",
    "nft_compat",
    "nft_chain_nat",
    "nft_counter",
    "nft_masq",
    "br_netfilter",
    "ip_tables",
    "iptable_nat",
    "iptable_filter",
    "xt_comment",
    "xt_mark",
    "xt_addrtype",
    "xt_conntrack",
    "xt_MASQUERADE",
    "xt_nat",
    "xt_multiport",
];

/// The modules of one kernel package.
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module's name and file.
pub type Module = (String, PathBuf);

/// The name a module has in the kernel: no directory, no suffix, underscores.
fn name_of(path: &str) -> Option<String> {
    let base = path.rsplit('/').next()?;
    Some(base.strip_suffix(".ko")?.replace('-', "_"))
}

impl Modules {
    /// Lists the modules below `dir` (`lib/modules/RELEASE` of a package).
    ///
    /// # Errors
    /// Those of reading the directory tree.
    pub fn scan(dir: &Path) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        let mut todo = vec![dir.join("kernel")];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    todo.push(entry.path());
                } else if let Some(name) = entry.file_name().to_str().and_then(name_of) {
                    files.insert(name, entry.path());
                }
            }
        }
        let builtin = fs::read_to_string(dir.join("modules.builtin"))
            .unwrap_or_default()
            .lines()
            .filter_map(name_of)
            .collect();
        Ok(Self { files, builtin })
    }

    /// The files to insert, in order, for `wanted` and everything below them.
    /// Modules that the kernel has built in need nothing; unknown ones are
    /// returned in the second list.
    ///
    /// # Errors
    /// Those of reading the modules.
    pub fn resolve(&self, wanted: &[&str]) -> io::Result<(Vec<Module>, Vec<String>)> {
        let (mut order, mut missing) = (Vec::new(), Vec::new());
        let mut seen = BTreeSet::new();
        for name in wanted {
            self.visit(&name.replace('-', "_"), &mut seen, &mut order, &mut missing)?;
        }
        Ok((order, missing))
    }

    fn visit(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<Module>,
        missing: &mut Vec<String>,
    ) -> io::Result<()> {
        if self.builtin.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            missing.push(name.to_owned());
            return Ok(());
        };
        for below in depends(&fs::read(path)?) {
            self.visit(&below, seen, order, missing)?;
        }
        order.push((name.to_owned(), path.clone()));
        Ok(())
    }
}

/// The names in the `depends=` entry of a module.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let value = value.split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depends_are_read_from_modinfo() {
        let module = b"\x7fELF..license=GPL\0depends=kvm,irq-bypass\0retpoline=Y\0";
        assert_eq!(depends(module), ["kvm", "irq_bypass"]);
        assert!(depends(b"\0depends=\0name=x\0").is_empty());
        assert!(depends(b"no module").is_empty());
    }

    #[test]
    fn what_stands_below_comes_first_and_once() {
        let dir = std::env::temp_dir().join(format!("bulkhead-modules-{}", std::process::id()));
        fs::create_dir_all(dir.join("kernel/sub")).unwrap();
        fs::write(dir.join("modules.builtin"), "kernel/lib/base.ko\n").unwrap();
        let put = |name: &str, deps: &str| {
            fs::write(
                dir.join("kernel/sub").join(name),
                format!("x\0depends={deps}\0"),
            )
            .unwrap();
        };
        put("top-a.ko", "mid,base");
        put("top_b.ko", "mid");
        put("mid.ko", "low");
        put("low.ko", "");
        let modules = Modules::scan(&dir).unwrap();
        let (order, missing) = modules.resolve(&["top_a", "top-b", "absent"]).unwrap();
        let names: Vec<_> = order.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["low", "mid", "top_a", "top_b"]);
        assert_eq!(missing, ["absent"]);
        fs::remove_dir_all(dir).unwrap();
    }
}
