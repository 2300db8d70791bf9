{{- /* Refuse what the schema, which sees one value at a time, cannot: {root, server}, of a server with its defaults. */ -}}
{{- define "rmd.check" -}}
{{- $values := .root.Values }}
{{- $server := .server }}
{{- $where := printf "server '%s'" $server.name }}
{{- $name := printf "%s-%s" (include "rmd.name" .root) $server.name }}
{{- if gt (len $name) 63 }}
{{- fail (printf "%s: its Service would be called %s, and a name has at most 63 characters; shorten it, or the release's" $where $name) }}
{{- end }}
{{- $several := or $server.autoscaling.enabled (gt (int $server.replicas) 1) (and $server.ray.enabled (gt (int $server.ray.fronts) 1)) }}
{{- if and $several (not (and $values.database.secret $values.objects.secret)) }}
{{- fail (printf "%s: several replicas, or fronts of Ray's, share films, linked pictures and idempotent replies through database.secret and objects.secret; set both" $where) }}
{{- end }}
{{- with $server.autoscaling }}
{{- if and .enabled (not $values.prometheus.address) }}
{{- fail (printf "%s: autoscaling asks Prometheus for the admitted work; set prometheus.address" $where) }}
{{- end }}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) }}
{{- fail (printf "%s: autoscaling.minReplicas (%d) is more than maxReplicas (%d)" $where (int .minReplicas) (int .maxReplicas)) }}
{{- end }}
{{- end }}
{{- with $server.ray }}
{{- if and .enabled (gt (int .minEngines) (int .maxEngines)) }}
{{- fail (printf "%s: ray.minEngines (%d) is more than maxEngines (%d)" $where (int .minEngines) (int .maxEngines)) }}
{{- end }}
{{- end }}
{{- with $server.strategy.rollingUpdate }}
{{- if and (hasKey . "maxSurge") (hasKey . "maxUnavailable") (has (toString .maxSurge) (list "0" "0%")) (has (toString .maxUnavailable) (list "0" "0%")) }}
{{- fail (printf "%s: a roll-out that may neither add a pod (maxSurge 0) nor end one (maxUnavailable 0) cannot begin" $where) }}
{{- end }}
{{- end }}
{{- if and (contains "://" (default "" $server.settings.objects)) $values.networkPolicy.enabled (not $values.networkPolicy.egress) }}
{{- fail (printf "%s: networkPolicy.egress: pods may ask names alone; add the rule that lets them reach %s" $where $server.settings.objects) }}
{{- end }}
{{- end }}
