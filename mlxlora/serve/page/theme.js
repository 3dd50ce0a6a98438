// Runs before anything is painted, so that a dark page never flashes white.
{
  let theme = null;
  try {
    theme = localStorage.getItem("mlxlora.theme");
  } catch {
    // storage is forbidden: the system's theme holds
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
